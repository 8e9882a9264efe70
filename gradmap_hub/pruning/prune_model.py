"""Depth pruning as one computation in memory: score, select, compensate. No file is read or written here.

`prune_model` does the computation of `gradmap_hub.prune`; the pipeline runs the same functions as stages and stores
their results on disk. `Overrides` are the weights that change: (original layer, parameter name within it) -> new value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from gradmap_hub.config import WITHOUT_WEIGHTS, PruneMethod
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.pruning.scores import LayerScores
from gradmap_hub.record import Candidate, CompensationRecord

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor, nn

    from gradmap_hub.data.rows import CalibrationRows
    from gradmap_hub.models.architectures import Architecture
    from gradmap_hub.models.decoder import Decoder

Overrides: TypeAlias = "dict[tuple[int, str], Tensor]"


@dataclass(frozen=True)
class Selected:
    """Measured sets of removed layers, lowest held-out loss first. `by_hand`: the user named the layers."""

    candidates: list[Candidate]
    by_hand: bool = False


@dataclass(frozen=True)
class Compensated:
    """The set of `removed` layers with the lowest held-out loss after compensation. `candidates`: all measured sets,
    with their loss after compensation where it was fitted. If the user named the layers, `winner` is None and
    `candidates` is empty."""

    removed: list[int]
    winner: Candidate | None
    candidates: list[Candidate]
    compensation: CompensationRecord


@dataclass(frozen=True)
class PrunedModel:
    """The result of `prune_model`: the layers to remove (`chosen`) and the new values of kept weights (`overrides`)."""

    scores: LayerScores
    chosen: Compensated
    overrides: Overrides

    @property
    def removed(self) -> list[int]:
        return self.chosen.removed


def prune_model(
    decoder: Decoder,
    rows: CalibrationRows,
    method: PruneMethod,
    removals: int,
    *,
    drop: Sequence[int] | None = None,
    reporter: Reporter | None = None,
) -> PrunedModel:
    """Choose `removals` layers of `decoder` to remove and compute the compensation; the model is unchanged.

    Args:
        rows: Token sequences that score, fit and decide; see `gradmap_hub.data.rows.split_rows`.
        method: The options of pruning.
        removals: Number of layers to remove; ignored if `drop` is given.
        drop: Indices of the layers to remove; None: choose them.
        reporter: Receives the progress.

    Raises:
        BrokenCheckpointError: the activations or the loss of the original are not finite, or too large.

    Example:
        >>> pruned = prune_model(decoder, rows, PruneMethod(), removals=8)
        >>> model = apply_pruning(decoder, architecture, pruned.removed, pruned.overrides)
    """
    from gradmap_hub.pruning.scoring import score_layers

    reporter = reporter or SilentReporter()
    scores = score_layers(
        decoder,
        rows.fit[: method.scoring_rows],
        weights=method.metric not in WITHOUT_WEIGHTS,
        row_done=reporter.advance,
    )
    selected = select_layers(decoder, rows, scores, method, removals, drop=drop, reporter=reporter)
    chosen, overrides = compensate_layers(decoder, rows, selected, method, reporter=reporter)
    return PrunedModel(scores, chosen, overrides)


def select_layers(
    decoder: Decoder,
    rows: CalibrationRows,
    scores: LayerScores,
    method: PruneMethod,
    removals: int,
    *,
    drop: Sequence[int] | None = None,
    reporter: Reporter,
) -> Selected:
    """Form candidate sets of layers from the scores, and measure their loss on `rows.selection`. `removals`, `drop`:
    see `prune_model`."""
    from gradmap_hub.pruning.candidates import candidates, stems
    from gradmap_hub.pruning.scoring import iterative_removals
    from gradmap_hub.pruning.search import SWAPS_MEASURED, search_layers

    swaps = method.swaps and drop is None
    grown: dict[str, list[int]] = {}
    if drop is not None:
        sets = {"chosen by hand": sorted(drop)}
    elif method.schedule == "iterative":
        scoring = rows.fit[: method.scoring_rows]
        reporter.total(len(scoring) * removals)
        sets = {"gradient, iterative": iterative_removals(decoder, scoring, removals, row_done=reporter.advance)}
    else:
        sets = candidates(scores, removals, method.metric)
        grown = stems(scores, removals, method.metric)
    count = len(rows.selection)
    reporter.total(count * (len(sets) + (2 if grown else 0) + (SWAPS_MEASURED + 2 if swaps else 0)))
    found = search_layers(decoder, rows.selection, sets, stems=grown, swaps=swaps, rows_done=reporter.advance)
    return Selected(found, by_hand=drop is not None)


def compensate_layers(
    decoder: Decoder, rows: CalibrationRows, selected: Selected, method: PruneMethod, *, reporter: Reporter
) -> tuple[Compensated, Overrides]:
    """Fit the compensation of the best few sets; the set with the lowest held-out loss afterwards wins.

    Returns the choice, and the weights that its compensation changes.
    """
    from gradmap_hub.pruning.candidates import finalists
    from gradmap_hub.pruning.compensation import compensate_best, with_shift

    sets = finalists(selected.candidates, method.compensation != "none")
    compensated, place, record, overrides = compensate_best(decoder, rows, sets, method, reporter)
    winner = compensated[place]
    record = with_shift(decoder, rows, winner.removed, record, method, reporter)
    measured = {tuple(candidate.removed): candidate for candidate in compensated}
    chosen = Compensated(
        winner.removed,
        None if selected.by_hand else winner,
        [] if selected.by_hand else [measured.get(tuple(c.removed), c) for c in selected.candidates],
        record,
    )
    return chosen, overrides


def apply_pruning(
    decoder: Decoder, architecture: Architecture, removed: Sequence[int], overrides: Overrides
) -> nn.Module:
    """Set the new weights and remove the layers, in place. Returns the decoder's model, now a stock model with
    `len(removed)` fewer layers; do not use the decoder afterwards."""
    from gradmap_hub.pruning.removal import remove_layers

    for (layer, name), value in overrides.items():
        decoder.put(layer, {name: value})
    remove_layers(decoder.model, architecture, removed)
    return decoder.model
