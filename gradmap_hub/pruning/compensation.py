"""Stage 2: linear compensation that undoes as much of the drift as linear maps can, folded into weights.

The paper (GradMAP, arXiv 2602.14649) compensates at one layer, the one whose mean hidden state moved most, with a
projection of the MLP output. Here the layer before every gap is a site, in the order of the stream; `ridge` has the
closed forms, `residual` what they solve for in each family (experts, norms on the MLP output):

    the MLP of the layer before the gap          towards the stream after the gap: what the removed layers added
    attention and MLP of the first layer after   towards the original's stream at the same places

The second line applies to a gap without a layer before it, and to `site="around-gaps"`. That is not the default: it
lowered the loss on text like the calibration text and raised it on other text. Each site is fitted on the stream that
the sites before it leave, so that later sites correct what earlier ones could not. A site is kept only if it clearly
lowers the loss on held-out sequences (see `lowers`). The original's stream is carried along the layers once for all
sets of removed layers, the pruned model's once for all sites of a set; Gram matrices are summed sequence by sequence,
and no matrix of all tokens is ever stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmap_hub.config import PruneMethod
from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.models.architectures import compensation_skipped
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.progress import Reporter
from gradmap_hub.pruning.fitting import accumulate_gram, fitted_gain, site_kind, solved, through_norm
from gradmap_hub.pruning.ridge import RidgeSolution
from gradmap_hub.pruning.sites import Shift, Site, largest_shift, mean_shift, sites_at_gaps
from gradmap_hub.pruning.streams import Originals, Streams, stream_losses
from gradmap_hub.record import Candidate, CompensationRecord, SiteCompensation, Trial

# Ridge strengths (lambda over the mean Gram diagonal) by kind of fit: all are tried at the first site, the best of them
# at later sites, where the choice hardly matters. A few massive features dominate that mean, so that even 0.001 is a
# strong ridge for the other features: stronger ones were worse with 6 sequences of 512 tokens as well as with 54.
STRENGTHS: dict[str, tuple[float, ...]] = {"weight": (0.001, 0.0003), "projection": (0.03, 0.003)}
# The least gain of a site in nats per token of held-out loss: less is not worth the risk on other text.
MINIMUM_GAIN = 1e-3

# (layer, parameter name within the layer) -> new value, in the parameter's dtype.
Overrides = dict[tuple[int, str], Tensor]


def lowers(before: Tensor, after: Tensor) -> bool:
    """Whether the mean loss falls from `before` to `after`, both (n,) in nats per token over the same sequences, by
    more than MINIMUM_GAIN and by more than the standard error of the paired differences. Smaller gains may be
    chance."""
    gains = before - after
    error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(gains.mean()) > max(MINIMUM_GAIN, error)  # False for NaN


@dataclass
class _Fit:
    """The sites tried and accepted so far. `losses`: of each selection sequence with them, in nats per token."""

    losses: Tensor
    trials: list[Trial] = field(default_factory=list)
    accepted: list[SiteCompensation] = field(default_factory=list)
    overrides: Overrides = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


def fit_compensation(
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
    """Compensate site after site, and keep each site that lowers the loss on `rows.selection` by more than MINIMUM_GAIN
    and more than its standard error (see `lowers`). The model is unchanged afterwards.

    Args:
        rows: Sites are fitted on `rows.fit`.
        removed: Original indices of the removed layers.
        config: Its `compensation` and `site` are used, and its `shift_rows` for the site "largest-shift".
        sites: The sites to try, in the order of the stream; None: those of `config.site`.
        strengths: The ridge strengths to try; None: STRENGTHS of the kind of fit.
        originals: The original's streams over `rows`, to share between sets of removed layers; None: computed here.

    Returns:
        The record and the new parameters, which are empty if no site is kept. The record has the mean shift only if
        `config.site` is "largest-shift" and chose the site; `with_shift` adds it to any record.
    """
    skipped = compensation_skipped(decoder.architecture, decoder.model.config)
    if config.compensation == "none" or skipped is not None:
        reason = "not requested" if config.compensation == "none" else f"compensation skipped: {skipped}"
        return CompensationRecord(applied=False, reason=reason), {}
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    shift: Shift | None = None
    if sites is None and config.site == "largest-shift":
        shift = _shift(decoder, rows, kept, config, reporter)
        sites = [largest_shift(shift)]
    elif sites is None:
        sites = sites_at_gaps(kept, removed, behind=config.site == "around-gaps")
    kind = "projection" if config.compensation == "projection" else "weight"
    # Experts always get a projection, which has its own strengths.
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
            best: tuple[Tensor, RidgeSolution, Mapping[str, Tensor]] | None = None
            fit_kind = site_kind(decoder, site, kind)
            for strength in tried[fit_kind]:
                solution, values = solved(decoder, site, gram, fit_kind, strength)
                if through_norm(decoder, site):
                    values |= fitted_gain(decoder, site, streams, targets, values)
                with decoder.replaced(site.layer, values):
                    losses = stream_losses(decoder, hidden, rows.selection, rest)
                reporter.advance(len(rows.selection))
                loss = float(losses.mean())
                state.trials.append(Trial(site.layer, fit_kind, strength, loss, site.part))
                if best is None or loss < float(best[0].mean()):
                    best = losses, solution, values
            assert best is not None
            losses, solution, values = best
            tried[fit_kind] = [solution.strength]
            if not lowers(state.losses, losses):
                continue
            corrected.enter_context(decoder.replaced(site.layer, values))
            before, after = state.loss, float(losses.mean())
            state.accepted.append(
                SiteCompensation(site.layer, site.part, fit_kind, solution.strength, solution.ridge, before, after)
            )
            state.overrides.update({(site.layer, name): value for name, value in values.items()})
            state.losses = losses
    record = _record(state, baseline)
    return record if shift is None else _shifted(record, shift), state.overrides


def compensate_best(
    decoder: Decoder, rows: CalibrationRows, sets: Sequence[Candidate], config: PruneMethod, reporter: Reporter
) -> tuple[list[Candidate], int, CompensationRecord, Overrides]:
    """Compensate for each of several sets of removed layers; the original's streams are computed once for all.

    Returns:
        The sets with their losses after compensation, the position of the set with the lowest loss, and the record and
        new parameters of that set.

    Raises:
        ValueError: there are no sets.
    """
    originals = Originals(decoder, rows)
    corrected: list[Candidate] = []
    best: tuple[float, int, CompensationRecord, Overrides] | None = None
    for place, candidate in enumerate(sets):
        record, overrides = fit_compensation(decoder, rows, candidate.removed, config, reporter, originals=originals)
        loss = candidate.loss if record.loss_after is None else record.loss_after
        corrected.append(dataclasses.replace(candidate, corrected=record.loss_after))
        if best is None or loss < best[0]:
            best = loss, place, record, overrides
    if best is None:
        raise ValueError("no sets of layers")
    return corrected, *best[1:]


def with_shift(
    decoder: Decoder,
    rows: CalibrationRows,
    removed: Sequence[int],
    record: CompensationRecord,
    config: PruneMethod,
    reporter: Reporter,
) -> CompensationRecord:
    """The record with the mean shift after every kept layer, before compensation; computed only if it is missing."""
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


def _record(state: _Fit, baseline: float) -> CompensationRecord:
    record = CompensationRecord(
        applied=bool(state.accepted),
        loss_before=baseline,
        loss_after=state.loss,
        reason="lowest held-out loss" if state.accepted else "no site lowered the held-out loss",
        trials=state.trials,
        corrections=state.accepted,
    )
    if not state.accepted:
        return record
    main = max(state.accepted, key=lambda entry: entry.loss_before - entry.loss_after)
    return dataclasses.replace(record, kind=main.kind, site=main.layer, strength=main.strength, ridge=main.ridge)
