"""Reads the record of a model folder; writes record, card and compare.json together."""

from __future__ import annotations

from pathlib import Path

from gradmap_hub.comparison import COMPARE, read_comparison
from gradmap_hub.errors import SourceError
from gradmap_hub.evaluation.staleness import without_stale
from gradmap_hub.layout import space_folder_of
from gradmap_hub.models.safetensors_files import ADAPTER_CONFIG
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord


def read_folder(folder: Path) -> RunRecord:
    """The record of a model folder. The compare.json of its Space folder, if any, is checked too, because
    `write_results` rewrites it after the work.

    Raises:
        SourceError: the record is missing, or one of the two is invalid (the error names the field); or the folder has
            an adapter, which transformers would load on top of the model.
    """
    record = RunRecord.read(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise SourceError(
            f"{folder} has an {ADAPTER_CONFIG} beside the model: transformers would load that adapter too.",
            hint="Move the files of the adapter out of the folder.",
        )
    if (space_folder_of(folder) / COMPARE).exists():
        read_comparison(space_folder_of(folder))
    return record


def write_results(record: RunRecord, folder: Path, reporter: Reporter | None = None) -> RunRecord:
    """Drop measurements of files that have changed, then write record and card into `folder` and update compare.json in
    its Space folder, if there is one. A dropped measurement is noted to `reporter`.

    Returns:
        The record as written.
    """
    from gradmap_hub.card.card import write_card
    from gradmap_hub.space.app import refresh_compare

    current = without_stale(record, folder)
    if current != record and reporter is not None:
        reporter.note(f"{current.measured_note}.")
    current.write(folder)
    write_card(current, folder)
    refresh_compare(current, space_folder_of(folder))
    return current
