"""An evaluation is valid for the files it measured. It is dropped, with the reason, if the folder has other files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gradmap_hub.errors import SourceError
from gradmap_hub.layout import sha256_of, weights_sha256
from gradmap_hub.measurements import Measured, MeasuredFile
from gradmap_hub.record import FILE_NAME, RunRecord, read_record

_AGAIN = "measure again with gradmap-hub evaluate"


def folder_sha256(folder: Path) -> str:
    """One checksum over the safetensors files directly in a folder. Pipes are skipped: reading one would never end."""
    return weights_sha256(path for path in folder.glob("*.safetensors") if path.is_file())


def data_file(graph: Path) -> Path | None:
    """The external weight file of an ONNX graph; None if it has none."""
    return next((path for ending in ("_data", ".data") if (path := Path(f"{graph}{ending}")).is_file()), None)


def without_stale(record: RunRecord, folder: Path) -> RunRecord:
    """The record without measurements of files that the folder does not hold; `measured_note` says what was dropped."""
    measured = record.measured
    if measured is None:
        return record
    if folder_sha256(folder) != measured.weights_sha256:
        note = f"An evaluation of other weights is not shown; {_AGAIN}"
        return dataclasses.replace(record, measured=None, measured_note=note)
    gone = {entry.path for entry in measured.files if not _is_there(entry, folder)}
    if not gone:
        return record
    note = f"The evaluation of {', '.join(sorted(gone))} was of another file and is not shown; {_AGAIN}"
    return dataclasses.replace(record, measured=_without(measured, gone), measured_note=note)


def with_earlier(record: RunRecord, folder: Path) -> RunRecord:
    """A new record with the measurements of the folder's earlier record, for example after a resumed run; pass the
    result to `without_stale`."""
    try:
        earlier = read_record(folder / FILE_NAME)
    except (FileNotFoundError, SourceError):
        return record
    return dataclasses.replace(record, measured=earlier.measured, measured_note=earlier.measured_note)


def _is_there(entry: MeasuredFile, folder: Path) -> bool:
    graph = folder / entry.path
    if not graph.is_file() or sha256_of(graph) != entry.sha256:
        return False
    data = data_file(graph)
    return (sha256_of(data) if data else "") == entry.data_sha256


def _without(measured: Measured, gone: set[str]) -> Measured:
    return dataclasses.replace(
        measured,
        files=[entry for entry in measured.files if entry.path not in gone],
        speed=[entry for entry in measured.speed if entry.backend not in gone],
    )
