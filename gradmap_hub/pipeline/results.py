"""Writes record, card and the data of the Space together."""

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
    """The record of a model folder. The data of its Space, which `write_results` brings up to date, is checked too, so
    that it is not refused after the work.

    Raises:
        SourceError: one of them is missing or invalid, and the error names the field; or an adapter is in the folder,
            which transformers, here and wherever the folder is used, loads on top of the model.
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
    """Write record, card and the data of the Space next to the folder, without measurements of changed files.

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
