"""What is published can be opened by whoever downloads it; what else in a result folder is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import SourceError, VerificationError
from gradmap_hub.evaluation.staleness import folder_sha256
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.pipeline.opening import check_opens
from gradmap_hub.pipeline.results import read_folder
from gradmap_hub.record import SCHEMA_VERSION, Base, CalibrationRecord, CompensationRecord, LayerDecision, RunRecord
from gradmap_hub.runtime import artifacts


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    """A folder with its exports as it is published."""
    found = tmp_path / "small"
    shutil.copytree(tiny.pruned, found)
    (found / "onnx").mkdir()
    shutil.copy(tiny.pruned_onnx / "model.onnx", found / "onnx")
    return found


def test_a_good_folder_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_opens(folder) == "onnx/model.onnx"
    monkeypatch.setattr(artifacts, "free_memory", lambda: 1000)
    assert check_opens(folder) == "tokenizer.json"  # no memory for the graph
    monkeypatch.undo()
    shutil.rmtree(folder / "onnx")
    assert check_opens(folder) == "tokenizer.json"


def _cut(folder: Path) -> None:
    graph = folder / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])


def _other_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: number + 1000 for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a cut graph": _cut,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a broken tokenizer": lambda folder: [(folder / "tokenizer.json").write_text("{}"), None][1],
    "a tokenizer of another model": _other_vocabulary,
    "a broken template": lambda folder: [(folder / "chat_template.jinja").write_bytes(b"\xff"), None][1],
    "a broken config": lambda folder: [(folder / "config.json").write_text("["), None][1],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_nobody_could_use_is_refused(name: str, folder: Path) -> None:
    DAMAGE[name](folder)
    with pytest.raises(VerificationError, match=r"cannot be opened .* Nothing was uploaded\.$") as caught:
        check_opens(folder)
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


def test_an_adapter_in_a_result_is_refused(folder: Path) -> None:
    """transformers would load it, and its own base model, where peft is installed."""
    record = RunRecord(
        SCHEMA_VERSION, "0", "gradmap-hub prune", "small", Base("someone/tiny"), [LayerDecision(0, 1.0, True, "")], [],
        0.25, BeforeAfter(2, 1), BeforeAfter(2, 1), "gradient", "oneshot",
        CalibrationRecord("wiki", 4, 128, 32, "0" * 64), CompensationRecord(False), 0,
    )  # fmt: skip
    record.write(folder)
    assert read_folder(folder) == record
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(SourceError, match=r"has an adapter_config\.json beside the model"):
        read_folder(folder)


def test_a_pipe_is_no_weight_file(folder: Path) -> None:
    before = folder_sha256(folder)
    os.mkfifo(folder / "more.safetensors")
    assert folder_sha256(folder) == before
