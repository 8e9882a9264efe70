"""Stage 2: one linear correction that undoes as much of the drift as a linear map can, folded into a weight.

Notation, for a site j (a kept layer), rows = calibration tokens:
    z   (n x f)  input of the MLP down projection W (d x f) of layer j in the pruned model
    m   = z W^T  its output (n x d)
    H   (n x d)  residual stream after layer j in the original model (at j's original index)
    H'  (n x d)  the same in the pruned model;  E = H - H' is the drift to undo

Since the residual stream is r + m, replacing m by m P^T, or W by W + D, changes H' by m (P - I)^T or z D^T:

    projection   min_P ||E - m (P - I)^T||^2 + lambda ||P - I||^2      GradMAP stage 2 (arXiv 2602.14649)
    weight       min_D ||E - z D^T||^2 + lambda ||D||^2                more unknowns (d x f), just as foldable

Both are ridge regressions with closed forms in the two Gram matrices G = z^T z and C = z^T E alone:
    D^T = (G + lambda I)^-1 C;    (P - I)^T = (W G W^T + lambda I)^-1 W C
With a bias, m = z W^T + b; m^T m and m^T E then also need the sums of z and E over tokens.
They are accumulated row by row in float64; no matrix of all tokens is ever kept. The fold is exact and adds nothing to
the graph: W <- P W (bias <- P bias) or W <- W + D. lambda = strength x mean diagonal of the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmap_hub.calibration import CalibrationRows
from gradmap_hub.config import PruneConfig
from gradmap_hub.decoder import Decoder, parameters_replaced
from gradmap_hub.progress import Reporter
from gradmap_hub.record import CompensationRecord, Trial

# lambda over the mean Gram diagonal. The first is tried at every site, the others at the best site only: the best
# site does not depend on the strength, and every trial costs a pass over the held-out rows.
STRENGTHS: dict[str, tuple[float, ...]] = {"weight": (0.03, 0.01, 0.1, 0.3), "projection": (0.03, 0.003, 0.3)}


@dataclass(frozen=True)
class Shift:
    """First moment of the drift after each kept layer: ||mean(H') - mean(H)||_2, absolute and over ||mean(H)||_2."""

    layers: list[int]
    absolute: list[float]
    relative: list[float]


@dataclass(frozen=True)
class Gram:
    """Sums over calibration tokens for one site, float64: zz (f, f), ze (f, d); tokens = n. `z` (f), `e` (d) are the
    sums of z and E, kept with the `bias` (d) of the down projection where it has one."""

    zz: Tensor
    ze: Tensor
    tokens: int
    bias: Tensor | None = None
    z: Tensor | None = None
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Correction:
    """What would be folded at a site. Exactly one of `projection` (d, d) and `delta` (d, f) is set; float64."""

    site: int
    kind: str
    strength: float
    ridge: float
    projection: Tensor | None = None
    delta: Tensor | None = None


def mean_shift(
    decoder: Decoder, ids: Tensor, kept: Sequence[int], row_done: Callable[[], None] = lambda: None
) -> Shift:
    """The mean shift after each kept layer, over rows `ids` (n, tokens)."""
    original = {layer: torch.zeros(0) for layer in kept}
    pruned = dict(original)

    def collect(into: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
        def add(layer: int, hidden: Tensor) -> None:
            if layer in into:
                mean = hidden.double().mean(dim=(0, 1))
                into[layer] = into[layer] + mean if into[layer].numel() else mean

        return add

    with torch.no_grad():
        for row in ids.split(1):
            start = decoder.embed(row)
            decoder.run(start, range(decoder.count), collect(original))
            decoder.run(start, kept, collect(pruned))
            row_done()
    absolute = [float((pruned[layer] - original[layer]).norm()) / len(ids) for layer in kept]
    relative = [
        value * len(ids) / max(float(original[layer].norm()), 1e-12)
        for value, layer in zip(absolute, kept, strict=True)
    ]
    return Shift(list(kept), absolute, relative)


def candidate_sites(shift: Shift, removed: Sequence[int], rule: str, limit: int = 3) -> list[int]:
    """Kept layers worth correcting. `largest-shift`: the paper's argmax of the absolute mean shift. `auto`: the
    largest relative shift, the first kept layer behind the last gaps, at most `limit` in all."""
    if rule == "largest-shift":
        return [shift.layers[max(range(len(shift.layers)), key=lambda position: shift.absolute[position])]]
    by_relative = sorted(range(len(shift.layers)), key=lambda position: -shift.relative[position])
    gone = set(removed)
    behind_gaps = [layer for layer in shift.layers if layer - 1 in gone]
    # Behind the last gap all drift has happened, so a correction there sees the whole of it.
    wanted = [shift.layers[by_relative[0]], *reversed(behind_gaps)]
    return list(dict.fromkeys(wanted))[:limit]


def accumulate_grams(
    decoder: Decoder,
    ids: Tensor,
    kept: Sequence[int],
    sites: Sequence[int],
    row_done: Callable[[], None] = lambda: None,
) -> dict[int, Gram]:
    """One pass of the original and of the pruned model over rows `ids`, up to the last site, for all sites at once.

    The layers before the first removed one are the same in both and run once.
    """
    last = max(sites)
    shared = [layer for position, layer in enumerate(kept) if layer == position and layer < min(sites)]
    original_rest = [layer for layer in range(len(shared), last + 1)]
    pruned_rest = [layer for layer in kept if layer >= len(shared) and layer <= last]
    zz: dict[int, Tensor] = {}
    ze: dict[int, Tensor] = {}
    z_sum: dict[int, Tensor] = {}
    e_sum: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def remember(site: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[site] = args[0].detach()

        return hook

    with torch.no_grad():
        for row in ids.split(1):
            stream = decoder.run(decoder.embed(row), shared)
            targets: dict[int, Tensor] = {}
            drifted: dict[int, Tensor] = {}
            decoder.run(stream, original_rest, _keep_at(sites, targets))
            handles = [decoder.mlp_output(site).register_forward_pre_hook(remember(site)) for site in sites]
            try:
                decoder.run(stream, pruned_rest, _keep_at(sites, drifted))
            finally:
                for handle in handles:
                    handle.remove()
            for site in sites:
                z = inputs[site].flatten(0, 1)  # (tokens, f)
                drift = (targets[site] - drifted[site]).flatten(0, 1)  # (tokens, d)
                # float32 products of one row, summed over rows in float64: a row is short enough to be exact.
                zz_row = (z.T @ z).double()
                ze_row = (z.T @ drift).double()
                zz[site] = zz[site] + zz_row if site in zz else zz_row
                ze[site] = ze[site] + ze_row if site in ze else ze_row
                z_sum[site] = z_sum.get(site, 0) + z.double().sum(dim=0)
                e_sum[site] = e_sum.get(site, 0) + drift.double().sum(dim=0)
            row_done()
    biases = {site: decoder.mlp_output(site).bias for site in sites}
    return {
        site: Gram(
            zz[site],
            ze[site],
            ids.numel(),
            bias=None if bias is None else bias.detach().double(),
            z=z_sum[site],
            e=e_sum[site],
        )
        for site, bias in biases.items()
    }


def _keep_at(sites: Sequence[int], into: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    def keep(layer: int, hidden: Tensor) -> None:
        if layer in sites:
            into[layer] = hidden

    return keep


def solve(gram: Gram, weight: Tensor, *, site: int, kind: str, strength: float) -> Correction:
    """The ridge solution for one site, in float64. `weight` is the down projection W (d, f)."""
    if kind == "weight":
        ridge = strength * float(gram.zz.diagonal().mean())
        delta = _ridge(gram.zz, gram.ze, ridge).T  # (d, f)
        return Correction(site, kind, strength, ridge, delta=delta)
    w = weight.detach().double()
    mm = w @ gram.zz @ w.T  # (d, d)
    me = w @ gram.ze  # (d, d)
    if gram.bias is not None and gram.z is not None and gram.e is not None:
        cross = torch.outer(w @ gram.z, gram.bias)
        mm = mm + cross + cross.T + gram.tokens * torch.outer(gram.bias, gram.bias)
        me = me + torch.outer(gram.bias, gram.e)
    ridge = strength * float(mm.diagonal().mean())
    projection = torch.eye(len(w), dtype=w.dtype, device=w.device) + _ridge(mm, me, ridge).T
    return Correction(site, kind, strength, ridge, projection=projection)


def _ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    ridge = max(ridge, torch.finfo(gram.dtype).tiny)  # all inputs zero: nothing to correct, rather than no solution
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def folded_weight(weight: Tensor, correction: Correction) -> Tensor:
    """W <- P W or W + D, computed in float64 and returned in float64 (d, f)."""
    w = weight.detach().double()
    if correction.projection is not None:
        return correction.projection.to(w.device) @ w
    assert correction.delta is not None
    return w + correction.delta.to(w.device)


def corrected_parameters(linear: nn.Linear, correction: Correction) -> dict[str, Tensor]:
    """The parameters of a down projection with the correction folded in, float64 cast once to their own dtype.

    A projection turns the bias too: P (W z + b) = (P W) z + P b.
    """
    parameters = {"weight": folded_weight(linear.weight, correction).to(linear.weight.dtype).contiguous()}
    if linear.bias is not None and correction.projection is not None:
        bias = correction.projection.to(linear.bias.device) @ linear.bias.detach().double()
        parameters["bias"] = bias.to(linear.bias.dtype)
    return parameters


class Suffix:
    """The pruned model from `site` on, for rows whose hidden states before it are computed once.

    Trying one more correction at the site then costs only the layers from the site to the end.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids: Tensor,
        kept: Sequence[int],
        site: int,
        row_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = decoder
        self._ids = ids
        self._site = site
        self._rest = [layer for layer in kept if layer >= site]
        before = [layer for layer in kept if layer < site]
        self._hidden: list[Tensor] = []
        with torch.no_grad():
            for row in ids.split(1):
                self._hidden.append(decoder.run(decoder.embed(row), before))
                row_done()

    def loss(self, correction: Correction | None, row_done: Callable[[], None] = lambda: None) -> float:
        """Mean NLL in nats per token over the rows with the correction (if any) folded in; the model is unchanged
        after."""
        decoder = self._decoder
        linear = decoder.mlp_output(self._site)
        values = corrected_parameters(linear, correction) if correction else {}
        losses: list[float] = []
        with parameters_replaced(linear, values), torch.no_grad():
            for row, hidden in zip(self._ids.split(1), self._hidden, strict=True):
                losses.append(float(decoder.row_losses(decoder.run(hidden, self._rest), row)))
                row_done()
        return sum(losses) / len(losses)


def fit_correction(
    decoder: Decoder,
    rows: CalibrationRows,
    kept: Sequence[int],
    removed: Sequence[int],
    config: PruneConfig,
    reporter: Reporter,
    baseline: float | None = None,
) -> tuple[CompensationRecord, dict[str, Tensor]]:
    """Try corrections at a few sites and keep the one with the lowest loss on `rows.selection`, if it lowers it.

    `baseline` is that loss without a correction (nats per token), computed here if not given. Returns the record and
    the corrected parameters of the site's down projection; they are empty if nothing is to be applied.
    """
    shift_rows = rows.fit[: max(2, config.scoring_rows // 2)]
    reporter.total(len(shift_rows))
    shift = mean_shift(decoder, shift_rows, kept, reporter.advance)
    shifts = {"shift_layers": shift.layers, "shift": shift.absolute, "relative_shift": shift.relative}
    if config.compensation == "none":
        return CompensationRecord(applied=False, reason="not asked for", **shifts), {}
    sites = candidate_sites(shift, removed, config.site)
    kinds = ("weight", "projection") if config.compensation == "auto" else (config.compensation,)
    count = len(sites) * len(kinds) + len(STRENGTHS["weight"]) - 1
    reporter.total(len(rows.fit) + len(rows.selection) * (count + len(sites)))
    grams = accumulate_grams(decoder, rows.fit, kept, sites, reporter.advance)
    suffixes = {site: Suffix(decoder, rows.selection, kept, site, reporter.advance) for site in sites}
    if baseline is None:
        baseline = suffixes[sites[0]].loss(None)
    tried: list[tuple[Trial, Correction]] = []

    def attempt(site: int, kind: str, strength: float) -> None:
        weight = decoder.mlp_output(site).weight
        correction = solve(grams[site], weight, site=site, kind=kind, strength=strength)
        loss = suffixes[site].loss(correction, reporter.advance)
        tried.append((Trial(site, kind, strength, loss), correction))

    for site in sites:
        for kind in kinds:
            attempt(site, kind, STRENGTHS[kind][0])
    leader = min(tried, key=lambda entry: entry[0].loss)[0]
    for strength in STRENGTHS[leader.kind][1:]:
        attempt(leader.site, leader.kind, strength)
    trials = [trial for trial, _ in tried]
    best, correction = min(tried, key=lambda entry: entry[0].loss)
    if not best.loss < baseline:  # so that not-a-number is no improvement either
        reason = "no correction lowered the held-out loss"
        return CompensationRecord(
            applied=False, reason=reason, loss_before=baseline, loss_after=baseline, trials=trials, **shifts
        ), {}
    record = CompensationRecord(
        applied=True,
        kind=best.kind,
        site=best.site,
        strength=best.strength,
        ridge=correction.ridge,
        loss_before=baseline,
        loss_after=best.loss,
        reason="lowest held-out loss",
        trials=trials,
        **shifts,
    )
    return record, corrected_parameters(decoder.mlp_output(best.site), correction)
