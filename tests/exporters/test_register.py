"""A further export format takes a row and a function; nothing of ours is edited."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PruneConfig
from gradmap_hub.exporters import export
from gradmap_hub.exporters.recipes import LADDERS
from gradmap_hub.formats import FORMATS, Format, register
from gradmap_hub.pipeline.export import export_folder
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.record import RunRecord
from gradmap_hub.runtime.artifacts import available_artifacts


@pytest.fixture
def toy() -> Iterator[Format]:
    row = Format("toy", "model_toy.onnx", "toy", "toy", "Exporting a toy", on_cpu=9)

    def write(shared: export.Shared, path: Path) -> None:
        shutil.copyfile(shared.optimum(), path)

    export.register(row, write)
    yield row
    export.unregister("toy")


def test_a_registered_format_is_exported_checked_and_recorded(
    toy: Format, tiny_folder: Path, tmp_path: Path, text_of: Any
) -> None:
    folder, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text(text_of(20_000, 2))
    method = PruneConfig(layers=1, calibration=(str(text),), samples=8, seq_len=64, eval_rows=2, compensation="none")
    prune(str(tiny_folder), folder, method)
    record = export_folder(folder, ["toy"], text=str(text))
    [made] = [entry for entry in record.artifacts if entry.format == "toy"]
    assert made.path == "onnx/model_toy.onnx" and made.quality is not None and made.parity is not None
    assert RunRecord.read(folder) == record
    sizes = {entry.path: entry.bytes for entry in record.artifacts}
    assert [entry.name for entry in available_artifacts(sizes)] == ["toy"]


def test_every_row_has_one_way_to_be_written() -> None:
    assert set(FORMATS) == set(export._WRITERS) | set(LADDERS) and not set(export._WRITERS) & set(LADDERS)
    assert {row.name for row in FORMATS.values() if row.may_fail} == set(LADDERS)


def test_names_and_files_are_unique() -> None:
    with pytest.raises(ValueError, match="already"):
        register(Format("other", "model.onnx", "other", "other", ""))
