"""Beside transformers 5, exports run in an environment of their own: made once, used again, or told why not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import ExportEnvironmentError
from gradmap_hub.exporters import environment
from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.progress import SilentReporter

only_5 = pytest.mark.skipif(not has_5(), reason="transformers 4.57: exports run in this environment")


class Told(SilentReporter):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def start(self, title: str) -> None:
        self.titles.append(title)


def test_the_bounds_are_those_of_the_extras() -> None:
    found = {line.partition("<")[0].partition(">")[0] for line in environment.requirements()}
    assert found == {
        "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "optimum", "optimum-onnx", "protobuf",
    }  # fmt: skip


def test_with_transformers_4_there_is_nothing_to_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "has_5", lambda: False)
    environment.prepare(SilentReporter())
    assert environment.python() == sys.executable and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_a_package_index_one_line_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip itself, with no index to ask; what it needs is in neither environment, whichever lane this is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(environment, "has_5", lambda: True)
    wanted = ["gradmap-no-such-package>=1"]
    monkeypatch.setattr(environment, "requirements", lambda: wanted)
    with pytest.raises(ExportEnvironmentError, match="No matching distribution found") as caught:
        environment.prepare(SilentReporter())
    assert caught.value.hint is not None and "pip install 'gradmap-no-such-package>=1'" in caught.value.hint
    assert "--no-onnx" in caught.value.hint and "\n" not in caught.value.message
    assert not list((tmp_path / "gradmap-hub").iterdir())
    with pytest.raises(ExportEnvironmentError):
        environment.python()


def test_other_requirements_are_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment.folder()
    assert environment.folder() == before
    monkeypatch.setattr(environment, "requirements", lambda: ["onnx>=2"])
    assert environment.folder() != before


@only_5
@pytest.mark.slow
def test_exports_of_a_pruned_model(
    folder_of: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole way: an environment made by pip, both graphs and a quantised one, each through its gate."""
    from gradmap_hub.config import PruneConfig
    from gradmap_hub.pipeline.export import export_folder
    from gradmap_hub.pipeline.prune import prune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = folder_of(tmp_path / "model")
    config = PruneConfig(layers=2, samples=8, seq_len=32, eval_rows=4, calibration=(str(text_file),))
    prune(str(model), tmp_path / "out", config)
    told: Any = Told()
    record = export_folder(tmp_path / "out", ["onnx", "int8", "genai"], text=str(text_file), reporter=told)
    graphs = {entry.path: entry for entry in record.artifacts if entry.path.endswith(".onnx")}
    assert set(graphs) == {"onnx/model.onnx", "onnx/model_int8.onnx", "onnx/model_genai.onnx"}
    parity = graphs["onnx/model.onnx"].parity
    assert parity is not None and parity.greedy_tokens_equal and parity.max_logit_difference <= 1e-3
    assert sum("transformers 4.57" in title for title in told.titles) == 1
    versions = "import transformers, torch; print(transformers.__version__, torch.__file__)"
    done = subprocess.run([environment.python(), "-c", versions], capture_output=True, text=True, check=True)
    version, torch = done.stdout.split()
    assert version.startswith("4.57.") and not torch.startswith(str(tmp_path))  # torch is the one that was there
    again: Any = Told()
    export_folder(tmp_path / "out", ["onnx"], text=str(text_file), reporter=again)
    assert not any("transformers 4.57" in title for title in again.titles)
