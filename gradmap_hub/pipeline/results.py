"""Writes record, card and the data of the Space together."""

from __future__ import annotations

from pathlib import Path

from gradmap_hub.evaluation.staleness import without_stale
from gradmap_hub.layout import space_folder_of
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord


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
