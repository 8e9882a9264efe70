"""The rows that a finished folder was calibrated on, drawn again from its record, to look for them in other texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.config import PruneMethod
from gradmap_hub.data.texts import is_local_text, text_of
from gradmap_hub.errors import CalibrationError, GradmapError, SourceError
from gradmap_hub.measurements import Contamination
from gradmap_hub.pipeline.reproduce import find_calibration
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub

_DRAWING = ("samples", "seq_len", "eval_rows", "seed")


# What goes on record: the failure itself may hold a path of this machine.
_NOT_AT_HAND = "the calibration texts are not at hand, or are not the recorded ones"
_OTHER_ROWS = "the calibration rows drawn here are not those of the record"


def find_contamination(
    record: RunRecord,
    texts: Sequence[Rows],
    tokenizer: Any,
    places: Sequence[Path],
    *,
    hub: Hub,
    reporter: Reporter,
    online: bool,
) -> list[Contamination]:
    """Per text, its rows that share words with the calibration rows, or why that was not checked. The calibration
    texts are looked for in `places`, and on the Hub if `online`."""
    from gradmap_hub.data.contamination import shared_rows

    try:
        drawn = _calibration(record, tokenizer, places, hub=hub, online=online)
    except GradmapError as error:
        reporter.note(f"Not checked whether the texts hold calibration rows: {error.message}")
        return [Contamination(None, len(rows.ids), _NOT_AT_HAND) for rows in texts]
    if drawn is None:
        reporter.note(f"Not checked whether the texts hold calibration rows: {_OTHER_ROWS}.")
        return [Contamination(None, len(rows.ids), _OTHER_ROWS) for rows in texts]
    calibration = {name: tokenizer.batch_decode(ids.tolist()) for name, ids in drawn.items()}
    found: list[Contamination] = []
    for rows in texts:
        words = tokenizer.batch_decode(rows.ids.tolist())
        hits = {name: shared_rows(words, group) for name, group in calibration.items()}
        shared = {row for indices in hits.values() for row in indices}
        found.append(Contamination(len(shared), len(words), "", [name for name, indices in hits.items() if indices]))
    return found


def _calibration(
    record: RunRecord, tokenizer: Any, places: Sequence[Path], *, hub: Hub, online: bool
) -> dict[str, Tensor] | None:
    """Rows by text; those that chose between layers, which are of all texts, under a name of their own. None if other
    rows come of the texts than those on record.

    Raises:
        GradmapError: the texts are not at hand, or are others.
    """
    from gradmap_hub.data.rows import split_rows

    sources = find_calibration(record, places)
    remote = next((source for source in sources if not is_local_text(source)), None)
    if remote is not None and not online:
        raise CalibrationError(f"The calibration text {remote} is on the Hub, which was not asked for anything else.")
    recorded = record.settings or {}
    try:
        settings = PruneMethod(**{name: recorded[name] for name in _DRAWING})
    except (KeyError, TypeError) as error:
        raise SourceError(f"The settings of the record cannot be read: {error}") from error
    rows = split_rows(
        [text_of(source, hub) for source in sources],
        tokenizer,
        seq_len=settings.seq_len,
        samples=settings.samples,
        selection=settings.selection_rows,
        held_out=settings.eval_rows,
        seed=settings.seed,
    )
    if rows.sha256 != record.calibration.sha256:
        return None
    chosen = f"{', '.join(source.name for source in rows.sources)}: rows that chose the layers"
    return {source.name: source.ids for source in rows.sources} | {chosen: rows.selection}
