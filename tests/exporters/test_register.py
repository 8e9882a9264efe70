"""A further export format takes a row and a writer; none of our code is edited."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import UsageError, VerificationError
from gradmap_hub.exporters.inputs import Inputs
from gradmap_hub.exporters.recipes import LADDERS
from gradmap_hub.exporters.writers import WRITERS, Writer, register, unregister
from gradmap_hub.formats import FORMATS, ONNX, Format, add_row, in_space, of_precision
from gradmap_hub.pipeline.export import export_folder
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.record import Quality, RunRecord
from gradmap_hub.runtime.artifacts import available_artifacts, choose_artifact
from gradmap_hub.space.plan import plan_of

Register = Callable[[Format, Writer], None]


@pytest.fixture
def registered() -> Iterator[Register]:
    """`registered(row, writer)`: registers a format for one test."""
    names: list[str] = []

    def add(row: Format, write: Writer) -> None:
        register(row, write)
        names.append(row.name)

    yield add
    for name in names:
        unregister(name)
    assert not set(names) & (set(FORMATS) | set(WRITERS))


@pytest.fixture(scope="module")
def pruned(folder_of: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registered")
    method = PruneConfig(
        layers=1, calibration=(str(text_file),), samples=8, seq_len=64, eval_rows=2, compensation="none"
    )
    prune(str(folder_of(root / "original")), root / "pruned", method)
    return root / "pruned"


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "pruned"))


def write_tensor_names(inputs: Inputs, path: Path) -> None:
    """Not an ONNX graph: the names of the checkpoint's tensors."""
    from safetensors import safe_open

    with safe_open(inputs.checkpoint / "model.safetensors", "np") as file:
        path.write_text(json.dumps(sorted(file.keys())))


def copy_optimum(inputs: Inputs, path: Path) -> None:
    shutil.copyfile(inputs.optimum(), path)


def test_a_file_that_is_not_a_graph_is_exported_and_recorded(
    registered: Register, folder: Path, text_file: Path
) -> None:
    with pytest.raises(UsageError, match="Cannot export to 'toy'"):
        export_folder(folder, ["toy"], text=str(text_file))
    row = Format("toy", "toy.bin", "Exporting tensor names", base="checkpoint", limits=None)
    registered(row, write_tensor_names)
    record = export_folder(folder, ["toy"], text=str(text_file))
    [made] = [entry for entry in record.artifacts if entry.format == "toy"]
    assert made.path == "onnx/toy.bin" and made.bytes == (folder / made.path).stat().st_size
    assert made.parity is None and made.quality is None  # not checked: nothing is claimed
    assert "model.norm.weight" in json.loads((folder / made.path).read_text())
    assert [path.name for path in (folder / "onnx").iterdir()] == ["toy.bin"]
    assert RunRecord.read(folder) == record
    assert available_artifacts({made.path: made.bytes}) == []  # ONNX Runtime does not run it
    assert PushConfig(model="model", quantize=("toy",)).quantize == ("toy",)


@pytest.mark.long
def test_a_graph_is_checked_chosen_and_compared(registered: Register, folder: Path, text_file: Path) -> None:
    row = Format("toy", "model_toy.onnx", "Exporting a toy", base="optimum", in_space=True, on_cpu=9)
    registered(row, copy_optimum)
    record = export_folder(folder, ["toy"], text=str(text_file))
    [made] = [entry for entry in record.artifacts if entry.format == "toy"]
    assert made.path == "onnx/model_toy.onnx" and made.parity is not None
    assert isinstance(made.quality, Quality) and (made.quality.base, made.quality.recipe) == ("optimum", "toy")
    found = available_artifacts({entry.path: entry.bytes for entry in record.artifacts})
    assert choose_artifact(found, memory=10**12).path == made.path
    base = dataclasses.replace(record.base, license="apache-2.0")
    assert plan_of(dataclasses.replace(record, base=base)).precisions == ("toy",)


def test_a_graph_that_fails_its_check_ends_the_export(registered: Register, folder: Path, text_file: Path) -> None:
    def write_nonsense(inputs: Inputs, path: Path) -> None:
        path.write_bytes(b"not a graph")

    registered(Format("toy", "model_toy.onnx", "Exporting a toy", base="checkpoint"), write_nonsense)
    with pytest.raises(VerificationError, match="toy export differs from PyTorch"):
        export_folder(folder, ["toy"], text=str(text_file))
    assert not list(folder.rglob("model_toy*"))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("name", {"name": ONNX}),
        ("file", {"file": "model.onnx"}),
        ("artifact", {"artifact": "fp32"}),
        ("precision", {"precision": "float32", "in_space": True}),
    ],
)
def test_no_two_formats_share_a_name(column: str, values: dict[str, Any]) -> None:
    row = Format(**{"name": "toy", "file": "toy.onnx", "title": "Exporting a toy", **values})
    before = dict(FORMATS)
    with pytest.raises(ValueError, match=column):
        add_row(row)
    assert before == FORMATS


def test_every_row_has_a_writer_or_recipes() -> None:
    assert set(FORMATS) == set(WRITERS) | set(LADDERS) and not set(WRITERS) & set(LADDERS)
    assert {row.name for row in FORMATS.values() if row.may_fail} == set(LADDERS)


def test_the_rows_agree_with_each_other() -> None:
    """A Space loads the format first that the runtime prefers on a CPU, and every name is that of one format."""
    rows = list(FORMATS.values())
    for column in ("name", "file", "artifact"):
        assert len({getattr(row, column) for row in rows}) == len(rows)
    for ranks in ([row.on_cpu for row in rows], [row.on_cuda for row in rows]):
        given = [rank for rank in ranks if rank is not None]
        assert len(set(given)) == len(given)
    spaces = in_space()
    assert [row.name for row in spaces] == ["int8", ONNX, "int4"]
    assert all(of_precision(row.precision) is row for row in spaces)
    assert all(0 < row.least_share <= row.most_share for row in rows)
    assert {row.name: (row.precision, row.artifact) for row in spaces}[ONNX] == ("float32", "fp32")
