"""What people import: lazy, typed, with the options of the commands, and described by docs/api.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import gradmap_hub
from gradmap_hub.config import MethodOptions, PruneMethod, PublishConfig, PublishOptions
from gradmap_hub.folder_config import EvaluateConfig
from gradmap_hub.record import RunRecord

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "onnxruntime", "typer", "rich")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_the_import_is_light() -> None:
    """CPU seconds, which other work on the machine does not change much."""
    code = (
        "import sys, time; started = time.process_time(); import gradmap_hub; "
        f"print(time.process_time() - started, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    seconds, loaded = min(run(code).split(" ", 1) for _ in range(3))
    assert float(seconds) < 0.1 and loaded == "[]"


def test_names_are_found_before_and_after_their_packages_are_loaded() -> None:
    code = (
        "from gradmap_hub import prune, push, export, evaluate, sweep, load, inspect, publish\n"
        "import gradmap_hub.pipeline.sweep, gradmap_hub.sweeping.record\n"
        "import gradmap_hub as package\n"
        "print(all(callable(getattr(package, name)) for name in package.__all__ if name != '__version__'))"
    )
    assert run(code) == "True"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        gradmap_hub.quantize  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("options", "config"), [(MethodOptions, PruneMethod), (PublishOptions, PublishConfig)])
def test_the_keyword_arguments_are_the_fields(options: type, config: type) -> None:
    assert list(get_type_hints(options)) == [entry.name for entry in dataclasses.fields(config)]


def test_evaluate_takes_every_option_with_its_default() -> None:
    given = inspect.signature(gradmap_hub.evaluate).parameters
    for entry in dataclasses.fields(EvaluateConfig):
        assert given[entry.name].default == entry.default, entry.name


def test_every_function_is_documented() -> None:
    for name in gradmap_hub.__all__:
        described = inspect.getdoc(getattr(gradmap_hub, name)) or ""
        if inspect.isfunction(getattr(gradmap_hub, name)):
            assert all(part in described for part in ("Args:", "Raises:", "Example:", f"import {name}"[7:])), name


def test_the_page_says_what_the_docstrings_say() -> None:
    specification = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == module.text(), "run: python docs/make_api.py"


def test_prune_and_load_as_a_library(tiny_folder: Path, tmp_path: Path, text_of: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(20_000, 1))
    record = gradmap_hub.prune(
        tiny_folder, tmp_path / "small", layers=1, calibration=(str(text),), samples=8, seq_len=64, eval_rows=2
    )
    assert len(record.removed) == 1 and RunRecord.read(tmp_path / "small") == record
    with pytest.raises(gradmap_hub.GradmapError, match="ONNX"):
        gradmap_hub.load(tmp_path / "small")
