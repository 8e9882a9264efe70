"""The loader: one precision at a time, from where compare.json or the variables say."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

HUB = "a" * 40


@pytest.fixture
def loading(kit: SimpleNamespace) -> Any:
    kit.load_module("onnx_engine")  # imported by its name, as in a Space
    return kit.load_module("loading")


@pytest.fixture
def make(kit: SimpleNamespace, loading: Any, pair: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Builds a loader for the tiny pair, started; they are closed in the end."""
    made: list[Any] = []

    def build(**changes: Any) -> Any:
        file = tmp_path / "compare.json"
        file.write_text(json.dumps(kit.facts(**changes)), encoding="utf-8")
        if not (tmp_path / "original").exists():
            (tmp_path / "original").symlink_to(pair.original_onnx)
        made.append(loading.Loader(kit.load_module("compare").read_facts(file), tmp_path))
        made[-1].start()
        return made[-1]

    yield build
    assert all(loader.close(20) for loader in made)


def settle(loader: Any, precision: str) -> Any:
    """Ask for a precision until it is there, or could not be loaded."""
    until = time.monotonic() + 20
    while not loader.request(precision):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert loader.precision == precision
    return loader.status


def test_one_precision_is_held_at_a_time(make: Callable[..., Any], pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNED_MODEL", str(pair.pruned_onnx))
    loader = make()
    assert settle(loader, "int8").state == "ready"
    assert loader.request("int8")  # is there already: nothing is loaded
    ids = loader.models().original.text.encode("Hello")
    rounded = loader.models().original.start().step(ids)
    sessions = [weakref.ref(model.session) for model in (loader.models().original, loader.models().pruned)]
    assert not loader.request("float32")  # has only begun
    assert settle(loader, "float32").state == "ready"
    gc.collect()
    assert [session() for session in sessions] == [None, None]
    exact = loader.models().original.start().step(ids)
    assert 0 < np.abs(exact - rounded).max() < 0.2 * np.abs(exact).max()


def test_a_precision_that_fails_leaves_the_others(
    make: Callable[..., Any], pair: Any, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, prompting: Any
) -> None:
    monkeypatch.setenv("PRUNED_MODEL", str(pair.pruned_onnx))
    loader = make(precisions=[*kit.facts()["precisions"], kit.precision("int4", 1, 1)])
    status = settle(loader, "int4")
    assert status.state == "error" and "original" in status.message and "model_q4.onnx is missing" in status.message
    with pytest.raises(prompting.ModelError, match="model_q4"):
        loader.models()
    assert settle(loader, "int8").state == "ready"
    assert loader.models().original.context_length == 1024


@pytest.fixture
def prompting(kit: SimpleNamespace) -> Any:
    return kit.load_module("prompting")


def test_a_variable_names_the_precision_to_begin_with(
    make: Callable[..., Any], pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNED_MODEL", str(pair.pruned_onnx))
    monkeypatch.setenv("PRECISION", "float32")
    loader = make()
    assert (loader.first, settle(loader, "float32").state) == ("float32", "ready")
    monkeypatch.setenv("PRECISION", "int2")
    refused = make()
    assert refused.close(20)
    status = refused.status
    assert status.state == "error" and "PRECISION is 'int2'; this Space has int8, float32." in status.message


@pytest.mark.parametrize(
    ("variables", "repo_id", "revision", "where"),
    [
        ({}, "someone/tiny", HUB, "space"),
        # The original that is stored here, by its own name: still the stored one.
        ({"ORIGINAL_MODEL": "someone/tiny"}, "someone/tiny", HUB, "space"),
        ({"ORIGINAL_MODEL": "someone/tiny", "ORIGINAL_REVISION": HUB}, "someone/tiny", HUB, "space"),
        ({"ORIGINAL_REVISION": "b" * 40}, "someone/tiny", "b" * 40, "hub"),
        ({"ORIGINAL_MODEL": "other/model"}, "other/model", None, "hub"),
        ({"ORIGINAL_MODEL": "other/model", "ORIGINAL_REVISION": HUB}, "other/model", HUB, "hub"),
    ],
)
def test_another_model_never_comes_from_what_is_stored(
    kit: SimpleNamespace, loading: Any, monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str], repo_id: str, revision: str | None, where: str,
) -> None:  # fmt: skip
    compare = kit.load_module("compare")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    source = compare.Source("someone/tiny", "someone/tiny", HUB)
    found, stored = loading.from_environment(source, compare.Stored("space", "original"), "ORIGINAL")
    assert (found.repo_id, found.revision, stored.where) == (repo_id, revision, where)
    assert stored.path == ("original" if where == "space" else "onnx")


def test_only_the_files_of_the_precision_are_downloaded(
    make: Callable[..., Any], loading: Any, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(pair.pruned_onnx)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    monkeypatch.setenv("PRUNED_MODEL", "someone/tiny-pruned")
    monkeypatch.setenv("PRUNED_REVISION", HUB)
    loader = make()
    assert settle(loader, "int8").state == "ready"
    [(repo_id, revision, patterns)] = asked
    assert (repo_id, revision) == ("someone/tiny-pruned", HUB)
    assert [name for name in patterns if ".onnx" in name] == ["onnx/model_int8.onnx", "onnx/model_int8.onnx_data"]
