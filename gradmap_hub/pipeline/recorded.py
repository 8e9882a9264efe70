"""Finds what a finished folder was made from, by its record: the original, and the calibration sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.config import SELF, PruneMethod
from gradmap_hub.data.texts import is_local_text, text_of
from gradmap_hub.errors import CalibrationError, GradmapError, SourceError
from gradmap_hub.measurements import Contamination
from gradmap_hub.models.source import Source, find_source
from gradmap_hub.pipeline.reproduce import find_calibration
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.original import OriginalModel

_DRAWING = ("samples", "seq_len", "eval_rows", "seed")
# For the record; the message of the error may contain a local path.
_NOT_AVAILABLE = "the calibration texts are not available, or are not the recorded ones"
_OTHER_ROWS = "the calibration sequences drawn here differ from the recorded ones"


def compare_with_calibration(
    folder: Path,
    record: RunRecord,
    original: OriginalModel,
    texts: Sequence[Rows],
    names: Sequence[str],
    reporter: Reporter,
    hub: Hub,
) -> list[Contamination]:
    """For each text, the number of sequences with a 13-gram overlap with calibration sequences, or why it is unknown.

    The calibration texts are searched in `folder`, in the current folder and next to each text; on the Hub only if the
    original or a text comes from there.

    Args:
        folder: The pruned folder.
        record: Its record.
        original: The original, whose tokenizer is used.
        texts: Sequences of each text.
        names: The texts as given on the command line.
    """
    reporter.start("Comparing with the calibration text")
    local = [name for name in names if is_local_text(name)]
    places = [folder, Path.cwd(), *(Path(name).expanduser().parent for name in local)]
    online = original.source.base.commit is not None or len(local) < len(names)
    found = _find_contamination(record, texts, original.tokenizer(), places, hub=hub, reporter=reporter, online=online)
    checked = [entry.rows for entry in found if entry.rows is not None]
    reporter.finish(f"{sum(checked)} sequences with 13-gram overlap" if checked else "not checked")
    return found


def _find_contamination(
    record: RunRecord,
    texts: Sequence[Rows],
    tokenizer: Any,
    places: Sequence[Path],
    *,
    hub: Hub,
    reporter: Reporter,
    online: bool,
) -> list[Contamination]:
    from gradmap_hub.data.contamination import shared_rows

    try:
        drawn = _calibration(record, tokenizer, places, hub=hub, online=online)
    except GradmapError as error:
        reporter.note(f"Contamination by calibration sequences was not checked: {error.message}")
        return [Contamination(None, len(rows.ids), _NOT_AVAILABLE) for rows in texts]
    if drawn is None:
        reporter.note(f"Contamination by calibration sequences was not checked: {_OTHER_ROWS}.")
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
    """The calibration sequences by text name, drawn again, with one more entry for those that chose the layers. None if
    they differ from the recorded ones.

    Raises:
        GradmapError: the texts are not available, or differ from the recorded ones.
    """
    from gradmap_hub.data.rows import split_rows

    sources = find_calibration(record, places)
    if SELF in sources:
        raise CalibrationError("The calibration text was written by the original, and is not part of the folder.")
    remote = next((source for source in sources if not is_local_text(source)), None)
    if remote is not None and not online:
        raise CalibrationError(f"The calibration text {remote} is on the Hub, and this evaluation is offline.")
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
    chosen = f"{', '.join(source.name for source in rows.sources)}: sequences that chose the layers"
    return {source.name: source.ids for source in rows.sources} | {chosen: rows.selection}


def find_original(folder: Path, record: RunRecord, against: str | None, hub: Hub) -> Source:
    """The original: the model `against` (--against), else the recorded one.

    Raises:
        SourceError: the recorded one was local and `against` is None, or the model does not have the recorded number of
            layers.
    """
    model = against or record.base.repo_id
    if model is None:
        raise SourceError(
            f"{folder} was made from a local model, {record.base.name}.", hint="Give its path with --against."
        )
    source = find_source(model, record.base.commit if against is None else None, hub)
    if source.layer_count != record.layers_before:
        raise SourceError(
            f"{model} has {source.layer_count} layers; {folder} was made from a model of {record.layers_before}.",
            hint=f"Give the original of {folder} with --against.",
        )
    return source
