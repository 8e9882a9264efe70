"""Stage 2: linear corrections that undo as much of the drift as linear maps can, folded into weights.

The paper (GradMAP, arXiv 2602.14649) corrects one layer, the one whose mean hidden state moved most, with a projection
of the MLP output. Here the layer before every gap is a site, in the order of the stream; the closed forms are in
`ridge`, what they solve for in each family (experts, norms behind the MLP) in `residual`:

    the MLP of the layer before the gap          towards the stream behind the gap: what the lost layers added
    attention and MLP of the first layer after   towards the original's stream at the same places

The second line is for a gap that has no layer before it, and for `site="around-gaps"`: where it lowered the loss on
text like the fitted one, it raised it on other text. Each site is fitted on the stream as the sites before it left it,
so that later sites correct what earlier ones could not. A site is kept only if it lowers the loss on held-out rows, by
more than the standard error of that gain over the rows. The original's stream is carried along the layers once for all
sets of removed layers, the pruned model's once for all sites of a set; Gram matrices are summed row by row and no
matrix of all tokens is ever kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmap_hub.config import PruneMethod
from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.models.architectures import correction_skipped
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.progress import Reporter
from gradmap_hub.pruning.residual import ATTENTION, MLP, Tap, Writer, writer_of
from gradmap_hub.pruning.ridge import Correction, Gram, solve
from gradmap_hub.record import Candidate, CompensationRecord, SiteCorrection, Trial

# lambda over the mean Gram diagonal: all are tried at the first site, the best one at the others, where it hardly
# matters. The diagonal's mean is that of a few massive features, so that even 0.001 is a strong ridge for the others:
# stronger ones lost with 6 rows of 512 tokens as with 54.
STRENGTHS: dict[str, tuple[float, ...]] = {"weight": (0.001, 0.0003), "projection": (0.03, 0.003)}
# A site must lower the held-out loss by so many nats per token, or it is not worth its risk elsewhere.
MINIMUM_GAIN = 1e-3
MAX_SITES = 9

# (layer, parameter name within the layer) -> new value, in the parameter's dtype.
Overrides = dict[tuple[int, str], Tensor]


@dataclass(frozen=True)
class Site:
    """A linear that writes to the residual stream, and the original layer whose stream it is to restore: behind that
    layer (`part` MLP) or in its middle, behind its attention (`part` ATTENTION, where target = layer)."""

    layer: int
    part: str
    target: int


@dataclass(frozen=True)
class Shift:
    """First moment of the drift after each kept layer: ||mean(H') - mean(H)||_2, absolute and over ||mean(H)||_2."""

    layers: list[int]
    absolute: list[float]
    relative: list[float]


def mean_shift(
    decoder: Decoder, ids: Tensor, kept: Sequence[int], row_done: Callable[[], None] = lambda: None
) -> Shift:
    """The mean shift after each kept layer, over rows `ids` (n, tokens)."""
    original: dict[int, Tensor] = {}
    pruned: dict[int, Tensor] = {}

    def add(into: dict[int, Tensor], layer: int, states: list[Tensor]) -> None:
        mean = torch.stack([hidden.double().mean(dim=(0, 1)) for hidden in states]).sum(dim=0)
        into[layer] = into[layer] + mean if layer in into else mean

    present = set(kept)
    for group in ids.split(decoder.rows_per_pass):
        full = [decoder.embed(row) for row in group.split(1)]
        short = list(full)
        for layer in range(decoder.count):
            with decoder.layer(layer):
                decoder.carry(full, [layer])
                if layer in present:
                    decoder.carry(short, [layer])
                    add(original, layer, full)
                    add(pruned, layer, short)
        for _ in group:
            row_done()
    absolute = [float((pruned[layer] - original[layer]).norm()) / len(ids) for layer in kept]
    relative = [
        value * len(ids) / max(float(original[layer].norm()), 1e-12)
        for value, layer in zip(absolute, kept, strict=True)
    ]
    return Shift(list(kept), absolute, relative)


def sites_at_gaps(
    kept: Sequence[int], removed: Sequence[int], *, behind: bool = False, limit: int = MAX_SITES
) -> list[Site]:
    """The MLP before each gap, in the order of the stream; with `behind`, and where there is no layer before it, also
    attention and MLP of the first layer behind. If there are too many sites, small gaps are left out first."""
    gone = set(removed)
    gaps: list[tuple[int, int]] = []  # first and last removed layer of each run
    for layer in sorted(gone):
        if gaps and gaps[-1][1] == layer - 1:
            gaps[-1] = (gaps[-1][0], layer)
        else:
            gaps.append((layer, layer))
    by_size = sorted(gaps, key=lambda gap: (gap[0] - gap[1], gap[0]))[: max(1, limit // 3 if behind else limit)]
    sites: list[Site] = []
    for first, last in sorted(by_size):
        if first > 0 and Site(first - 1, MLP, first - 1) not in sites:
            sites.append(Site(first - 1, MLP, last))
        elif first > 0:
            # The layer between two gaps is the first after one and the last before the next: one fit, for the latter.
            sites[sites.index(Site(first - 1, MLP, first - 1))] = Site(first - 1, MLP, last)
        if (behind or first == 0) and last + 1 in kept:
            sites += [Site(last + 1, ATTENTION, last + 1), Site(last + 1, MLP, last + 1)]
    return sites


def largest_shift(shift: Shift) -> Site:
    """The paper's site: argmax of the absolute mean shift."""
    layer = shift.layers[max(range(len(shift.layers)), key=lambda position: shift.absolute[position])]
    return Site(layer, MLP, layer)


class Original:
    """The original's residual stream over rows `ids` (n, tokens) before the layers asked for, carried along the layers
    once for all sets of removed layers.

    What was asked for is kept, n x tokens x d for each; where layers are fetched, the last alone. It must have passed a
    layer before that layer's weights are replaced, so what is asked for between replacements only goes up.
    """

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self._decoder = decoder
        self._ids = ids
        self._known: dict[int, list[Tensor]] = {}

    def before(self, layer: int) -> list[Tensor]:
        """The stream before a layer, per row (1, tokens, d); the list is the caller's."""
        if layer not in self._known:
            nearest = max((known for known in self._known if known < layer), default=None)
            if nearest is None:
                states, start = [self._decoder.embed(row) for row in self._ids.split(1)], 0
            else:
                states, start = list(self._known[nearest]), nearest
            self._decoder.carry(states, range(start, layer))
            self.keep(layer, states)
        return list(self._known[layer])

    def keep(self, layer: int, states: list[Tensor]) -> None:
        """The stream before a layer, from a caller who ran what comes before it."""
        if self._decoder.rows_per_pass > 1:
            self._known.clear()
        self._known[layer] = states


class Streams:
    """The residual streams of original and pruned model over the same rows. The layers before `start` are the same in
    both."""

    def __init__(self, decoder: Decoder, original: Original, kept: Sequence[int], start: int) -> None:
        self._decoder = decoder
        self._original = original
        self._kept = kept
        self.pruned = original.before(start)
        self._pruned_next = start

    def targets(self, site: Site) -> list[Tensor]:
        """The original's stream that a site is to restore, per row (1, tokens, d)."""
        if site.part == MLP:
            return self._original.before(site.target + 1)
        decoder = self._decoder
        middles: list[Tensor] = []
        behind: list[Tensor] = []
        states = self._original.before(site.target)
        with decoder.layer(site.target) as module, torch.no_grad():
            for hidden in states:
                writer = writer_of(module, decoder.architecture, ATTENTION)
                with Tap(writer.added) as tap:
                    behind.append(decoder.step(hidden, site.target))
                middles.append(_behind(hidden, tap, writer))
        self._original.keep(site.target + 1, behind)  # now, as the layer's weights may be replaced next
        return middles

    def before(self, layer: int) -> list[Tensor]:
        """The pruned model's stream before a layer, per row."""
        self._decoder.carry(self.pruned, [index for index in self._kept if self._pruned_next <= index < layer])
        self._pruned_next = max(self._pruned_next, layer)
        return self.pruned


def _behind(hidden: Tensor, added: Tap, writer: Writer) -> Tensor:
    """The stream with what a writer adds to it, (1, tokens, d)."""
    output = added.output.reshape(hidden.shape)
    return hidden + (output if writer.scale == 1.0 else writer.scale * output)


# Rows whose products are summed in float32 before they go into the float64 sums: few enough to be exact.
_ROWS_PER_SUM = 4


def accumulate_gram(
    decoder: Decoder,
    site: Site,
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    row_done: Callable[[], None] = lambda: None,
) -> Gram:
    """Gram matrices of one site. `hidden`: the pruned model's stream before the site's layer; `targets`: what it
    should be behind the site; both per row, (1, tokens, d)."""
    with decoder.layer(site.layer) as module, torch.no_grad():
        writer = writer_of(module, decoder.architecture, site.part)
        width, features = writer.weight.shape
        like = {"dtype": torch.float64, "device": decoder.device}
        zz, ze = torch.zeros(features, features, **like), torch.zeros(features, width, **like)
        z_sum, e_sum = torch.zeros(features, **like), torch.zeros(width, **like)
        # Doubles stay doubles, everything else is multiplied in float32.
        single = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
        zz_part, ze_part = torch.zeros_like(zz, dtype=single), torch.zeros_like(ze, dtype=single)
        for index, (states, wanted) in enumerate(zip(hidden, targets, strict=True)):
            tap, reached = _reached(decoder, site, writer, states)
            drift = wanted.flatten(0, 1).to(single) - reached.flatten(0, 1).to(single)  # (tokens, d)
            z, drift = writer.equation(tap, drift)
            zz_part.addmm_(z.T, z)
            ze_part.addmm_(z.T, drift)
            z_sum += z.sum(dim=0)
            e_sum += drift.sum(dim=0)
            if index % _ROWS_PER_SUM == _ROWS_PER_SUM - 1 or index == len(hidden) - 1:
                zz += zz_part
                ze += ze_part
                zz_part.zero_()
                ze_part.zero_()
            row_done()
        bias = None if writer.bias is None else writer.bias.detach().double().clone()
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    return Gram(zz, ze, tokens, bias=bias, z=z_sum, e=e_sum)


def _reached(decoder: Decoder, site: Site, writer: Writer, states: Tensor) -> tuple[Tap, Tensor]:
    """The stream behind a site (1, tokens, d) for the stream before its layer, and what the writer saw."""
    with Tap(writer.tapped) as tap, Tap(writer.added) as added:
        after = decoder.step(states, site.layer)
    return tap, after if site.part == MLP else _behind(states, added, writer)


def _fitted_gain(
    decoder: Decoder, site: Site, hidden: Sequence[Tensor], targets: Sequence[Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weight of the norm behind a site, fitted to the site's corrected `values`."""
    with decoder.layer(site.layer) as module, decoder.replaced(site.layer, values), torch.no_grad():
        writer = writer_of(module, decoder.architecture, site.part)
        width = len(writer.weight)
        like = {"dtype": torch.float64, "device": decoder.device}
        cross, square = torch.zeros(width, **like), torch.zeros(width, **like)
        for states, wanted in zip(hidden, targets, strict=True):
            with Tap(writer.added) as added:
                _, reached = _reached(decoder, site, writer, states)
            output = added.output.reshape(-1, width).double()
            drift = (wanted.double() - reached.double()).reshape(-1, width) / writer.scale
            cross += (output * (output + drift)).sum(dim=0)
            square += output.square().sum(dim=0)
        return writer.fitted_gain(cross, square)


def stream_losses(decoder: Decoder, hidden: Sequence[Tensor], ids: Tensor, layers: Sequence[int]) -> Tensor:
    """NLL in nats per token of each of rows `ids`, whose streams `hidden` still have `layers` to run: (n,) float64."""
    states = list(hidden)
    with torch.no_grad():
        decoder.carry(states, layers)
        losses = [decoder.row_losses(last, row) for last, row in zip(states, ids.split(1), strict=True)]
    return torch.cat(losses).double().cpu()


def lowers(before: Tensor, after: Tensor) -> bool:
    """Whether the mean loss falls from `before` to `after` (n,), row by row the same text, by more than MINIMUM_GAIN
    and more than the standard error of the fall: on a few rows, a correction that helps one and harms another is luck.
    """
    gains = before - after
    error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(gains.mean()) > max(MINIMUM_GAIN, error)  # not-a-number is no improvement either


@dataclass
class _Fit:
    """What has been tried and accepted so far. `losses`: of each selection row."""

    losses: Tensor
    trials: list[Trial] = field(default_factory=list)
    accepted: list[SiteCorrection] = field(default_factory=list)
    overrides: Overrides = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


def fit_correction(
    decoder: Decoder,
    rows: CalibrationRows,
    removed: Sequence[int],
    config: PruneMethod,
    reporter: Reporter,
    *,
    sites: Sequence[Site] | None = None,
    strengths: Sequence[float] | None = None,
    originals: Originals | None = None,
) -> tuple[CompensationRecord, Overrides]:
    """Correct site after site, keeping what lowers the loss on `rows.selection`. The model is unchanged after.

    `sites` and `strengths` replace those of the config, for measurements of what would have been; `originals`: the
    original's streams over the rows, where other sets were corrected before. Returns the record, with the shift only if
    the site rests on it (see `with_shift`), and the corrected parameters; they are empty if nothing is to be applied.
    """
    skipped = correction_skipped(decoder.architecture, decoder.model.config)
    if config.compensation == "none" or skipped is not None:
        reason = "not asked for" if config.compensation == "none" else f"compensation skipped: {skipped}"
        return CompensationRecord(applied=False, reason=reason), {}
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    shift: Shift | None = None
    if sites is None and config.site == "largest-shift":
        shift = _shift(decoder, rows, kept, config, reporter)
        sites = [largest_shift(shift)]
    elif sites is None:
        sites = sites_at_gaps(kept, removed, behind=config.site == "around-gaps")
    kind = "projection" if config.compensation == "projection" else "weight"
    # A mixture of experts is always corrected by a projection, which has strengths of its own.
    tried = {each: list(strengths or STRENGTHS[each]) for each in (kind, "projection")}
    reporter.total(len(sites) * len(rows.fit) + (len(sites) + len(tried[kind])) * len(rows.selection))
    start = min(*(site.layer for site in sites), min(removed))
    with ExitStack() as corrected, torch.no_grad():
        originals = originals or Originals(decoder, rows)
        fitted = Streams(decoder, originals.fit, kept, start)
        watched = Streams(decoder, originals.selection, kept, start)
        rest = [layer for layer in kept if layer >= start]
        state = _Fit(stream_losses(decoder, watched.pruned, rows.selection, rest))
        baseline = state.loss
        for site in sites:
            targets, streams = fitted.targets(site), fitted.before(site.layer)
            gram = accumulate_gram(decoder, site, streams, targets, reporter.advance)
            rest = [layer for layer in kept if layer >= site.layer]
            hidden = watched.before(site.layer)
            best: tuple[Tensor, Correction, Mapping[str, Tensor]] | None = None
            fit_kind = site_kind(decoder, site, kind)
            for strength in tried[fit_kind]:
                correction, values = solved(decoder, site, gram, fit_kind, strength)
                if through_norm(decoder, site):
                    values |= _fitted_gain(decoder, site, streams, targets, values)
                with decoder.replaced(site.layer, values):
                    losses = stream_losses(decoder, hidden, rows.selection, rest)
                reporter.advance(len(rows.selection))
                loss = float(losses.mean())
                state.trials.append(Trial(site.layer, fit_kind, strength, loss, site.part))
                if best is None or loss < float(best[0].mean()):
                    best = losses, correction, values
            assert best is not None
            losses, correction, values = best
            tried[fit_kind] = [correction.strength]
            if not lowers(state.losses, losses):
                continue
            corrected.enter_context(decoder.replaced(site.layer, values))
            before, after = state.loss, float(losses.mean())
            state.accepted.append(
                SiteCorrection(site.layer, site.part, fit_kind, correction.strength, correction.ridge, before, after)
            )
            state.overrides.update({(site.layer, name): value for name, value in values.items()})
            state.losses = losses
    record = _record(state, baseline)
    return record if shift is None else _shifted(record, shift), state.overrides


class Originals:
    """The original's streams over the rows that corrections are fitted on and chosen by."""

    def __init__(self, decoder: Decoder, rows: CalibrationRows) -> None:
        self.fit = Original(decoder, rows.fit)
        self.selection = Original(decoder, rows.selection)


def correct_best(
    decoder: Decoder, rows: CalibrationRows, sets: Sequence[Candidate], config: PruneMethod, reporter: Reporter
) -> tuple[list[Candidate], int, CompensationRecord, Overrides]:
    """Correct several sets of removed layers, the original's streams carried once for all of them.

    Returns the sets with the losses that they came to, which of them is the lowest (the place in the list), and what
    `fit_correction` returned for it.
    """
    originals = Originals(decoder, rows)
    corrected: list[Candidate] = []
    best: tuple[float, int, CompensationRecord, Overrides] | None = None
    for place, candidate in enumerate(sets):
        record, overrides = fit_correction(decoder, rows, candidate.removed, config, reporter, originals=originals)
        loss = candidate.loss if record.loss_after is None else record.loss_after
        corrected.append(dataclasses.replace(candidate, corrected=record.loss_after))
        if best is None or loss < best[0]:
            best = loss, place, record, overrides
    if best is None:
        raise ValueError("no sets to correct")
    return corrected, *best[1:]


def with_shift(
    decoder: Decoder,
    rows: CalibrationRows,
    removed: Sequence[int],
    record: CompensationRecord,
    config: PruneMethod,
    reporter: Reporter,
) -> CompensationRecord:
    """The record with the mean shift of every kept layer, before any correction."""
    if record.shift_layers:
        return record
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    return _shifted(record, _shift(decoder, rows, kept, config, reporter))


def _shift(
    decoder: Decoder, rows: CalibrationRows, kept: Sequence[int], config: PruneMethod, reporter: Reporter
) -> Shift:
    ids = rows.fit[: config.shift_rows]
    reporter.total(len(ids))
    return mean_shift(decoder, ids, kept, reporter.advance)


def _shifted(record: CompensationRecord, shift: Shift) -> CompensationRecord:
    return dataclasses.replace(record, shift_layers=shift.layers, shift=shift.absolute, relative_shift=shift.relative)


def site_kind(decoder: Decoder, site: Site, kind: str) -> str:
    """The kind of correction that a site can have, where `kind` is wanted."""
    with decoder.layer(site.layer) as module:
        return "projection" if writer_of(module, decoder.architecture, site.part).experts else kind


def through_norm(decoder: Decoder, site: Site) -> bool:
    """Whether a norm stands between a site and the residual stream."""
    row = decoder.architecture
    return (row.mlp_norm if site.part == MLP else row.attention_norm) is not None


def solved(
    decoder: Decoder, site: Site, gram: Gram, kind: str, strength: float
) -> tuple[Correction, dict[str, Tensor]]:
    """The correction of a site and the parameters of its layer with the correction folded in."""
    with decoder.layer(site.layer) as module:
        writer = writer_of(module, decoder.architecture, site.part)
        correction = solve(gram, writer.weight, kind=kind, strength=strength)
        return correction, writer.folded(correction)


def _record(state: _Fit, baseline: float) -> CompensationRecord:
    record = CompensationRecord(
        applied=bool(state.accepted),
        loss_before=baseline,
        loss_after=state.loss,
        reason="lowest held-out loss" if state.accepted else "no correction lowered the held-out loss",
        trials=state.trials,
        corrections=state.accepted,
    )
    if not state.accepted:
        return record
    main = max(state.accepted, key=lambda entry: entry.loss_before - entry.loss_after)
    return dataclasses.replace(record, kind=main.kind, site=main.layer, strength=main.strength, ridge=main.ridge)
