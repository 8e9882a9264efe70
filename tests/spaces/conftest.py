"""A tiny real pair of models, deployed as a Space would be, for the tests of `spaces/`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gradmap_hub.formats import in_space, of_precision
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import Artifact, Base, CalibrationRecord, CompensationRecord, LayerDecision, Quality, RunRecord
from gradmap_hub.space.app import STANDALONE
from gradmap_hub.space.plan import SpacePlan

ROOT = Path(__file__).resolve().parents[2]
SPACES = ROOT / "spaces"
# Copied into every Space beside what lies in spaces/.
COPIED = {path.stem: path for path in STANDALONE}
QUALITY = Quality(20.1, 20.0, "other.txt", 4096, "int8, blocks of 32", "genai")


def load_module(name: str) -> ModuleType:
    """A module of spaces/, by path: the folder is content and must not be importable as a package.

    Its modules import each other as siblings, as they do in a Space, so the folder is on the path for
    as long as that takes.
    """
    if name in sys.modules:
        return sys.modules[name]
    file = COPIED.get(name, SPACES / f"{name}.py")
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(SPACES))
    for other in COPIED if name not in COPIED else ():
        load_module(other)  # found by its name from then on
    try:
        sys.modules[name] = module
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SPACES))
    return module


def precision(name: str, original: int, pruned: int, cost: float | None = None) -> dict[str, Any]:
    """An entry of compare.json: the original lies in the Space, the pruned model in its repository."""
    quality = None if cost is None else {
        "perplexity": 20.0 * cost, "checkpoint_perplexity": 20.0, "text": "other.txt", "tokens": 4096,
    }  # fmt: skip
    return {
        "name": name,
        "file": of_precision(name).file,
        "original": {"stored": "space", "path": "original", "bytes": original, "quality": quality},
        "pruned": {"stored": "hub", "path": "onnx", "bytes": pruned, "quality": quality},
    }


def facts(**changes: Any) -> dict[str, Any]:
    """A compare.json that fits the tiny pair."""
    return {
        "schema_version": 2,
        "title": "Tiny, one layer lighter",
        "runtime": "onnx",
        "precision": "int8",
        "precisions": [precision("int8", 170_000, 130_000, cost=1.004), precision("float32", 600_000, 440_000)],
        "original": {"name": "someone/tiny", "repo_id": "someone/tiny", "revision": None},
        "pruned": {"name": "someone/tiny-pruned", "repo_id": None, "revision": None},
        "layers": {"original": 3, "pruned": 2, "removed": [1]},
        "parameters": {"original": 150_000, "pruned": 110_000},
        "bytes": {"original": 600_000, "pruned": 440_000},
        "perplexity": [{"text": "wiki (held out)", "tokens": 8192, "original": 17.6, "pruned": 22.4}],
        "compensation": {"applied": True},
        "examples": ["What is the capital of France?", "Explain gravity.", "List three uses."],
        "license": "apache-2.0",
    } | changes  # fmt: skip


def deploy(folder: Path, tiny: Any, content: dict[str, Any] | None = None) -> Path:
    """The folder as it lies in a Space, with one of the engines."""
    content = facts() if content is None else content
    folder.mkdir(parents=True)
    unused = {"onnx": "transformers", "transformers": "onnx"}[content["runtime"]]
    for file in [*SPACES.glob("*.py"), SPACES / "style.css", *STANDALONE]:
        if file.name != f"{unused}_engine.py":
            shutil.copy(file, folder)
    shutil.copytree(tiny.original_onnx, folder / "original")
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def record_for(onnx: Path | None = None, **changes: Any) -> RunRecord:
    """The record of a run that made a tiny pruned folder. `onnx`: the folder of its ONNX files, if there are some."""
    artifacts = [
        Artifact(f"onnx/{row.file}", (onnx / row.file).stat().st_size, "0" * 64, row.name, None,
                 QUALITY if row.precision != "float32" else None)
        for row in in_space()
        if onnx is not None and (onnx / row.file).is_file()
    ]  # fmt: skip
    record = RunRecord(
        schema_version=2,
        gradmap_hub="0",
        command="gradmap-hub push someone/tiny --layers 1",
        name="tiny-pruned",
        base=Base("someone/tiny", "someone/tiny", "main", "c" * 40, "apache-2.0", dtype="float32"),
        layers=[LayerDecision(index, 1.0 + index, index != 1, "") for index in range(3)],
        removed=[1],
        ratio=1 / 3,
        parameters=BeforeAfter(150_000, 110_000),
        bytes=BeforeAfter(600_000, 440_000),
        metric="gradient",
        schedule="oneshot",
        calibration=CalibrationRecord("wiki", 4, 128, 32, "0" * 64),
        compensation=CompensationRecord(False),
        seed=0,
        artifacts=artifacts,
    )
    return dataclasses.replace(record, **changes)


def plan_for(*precisions: str, stored: tuple[str, ...] | None = None) -> SpacePlan:
    return SpacePlan("space", "for a test", precisions, precisions if stored is None else stored)


@dataclass
class App:
    """A Space that runs on this machine."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            assert answer.status == 200
            return json.load(answer)

    def wait_until(self, done: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            try:
                health = self.health()
            except OSError:
                health = None
            if health is not None and done(health):
                return health
            time.sleep(0.1)
        raise AssertionError(self.log.read_text(encoding="utf-8"))


def start_app(folder: Path, *, python: str = sys.executable, **variables: str) -> App:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dropped = ("SYSTEM", "SPACE_ID", "GRADIO_", "HF_", "ORIGINAL_", "PRUNED_", "PRECISION", "HTTP_PROXY",
               "HTTPS_PROXY")  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", **variables}
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen([python, "app.py"], cwd=folder, env=environment, stdout=output, stderr=output)
    return App(f"http://127.0.0.1:{port}", process, log)


def stop_app(app: App) -> int:
    app.process.terminate()
    try:
        return app.process.wait(30)
    except subprocess.TimeoutExpired:
        app.process.kill()
        raise


@pytest.fixture(scope="session")
def pair(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny pair with 8-bit files beside the float32 ones; of its own, as other tests want what they find there."""
    from gradmap_hub.exporters.quantized import quantise
    from gradmap_hub.exporters.recipes import INT8

    root = tmp_path_factory.mktemp("pair")
    copies = {}
    for side in ("original", "pruned"):
        copies[f"{side}_onnx"] = folder = root / side
        shutil.copytree(getattr(tiny, f"{side}_onnx"), folder)
        quantise(folder / "model.onnx", folder / "model_int8.onnx", INT8[0], None)
    return SimpleNamespace(original=tiny.original, pruned=tiny.pruned, **copies)


@pytest.fixture(scope="session")
def slow_model(export_tiny: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32 whose steps take milliseconds, and whose answers do not end before the limit."""
    root = tmp_path_factory.mktemp("slow")
    export_tiny(root / "checkpoint", root / "onnx", 6, endless=True, hidden=768)
    return root / "onnx"


@contextmanager
def running_app(folder: Path, **variables: str) -> Iterator[App]:
    """The app of a deployed folder with its models loaded."""
    app = start_app(folder, **variables)
    try:
        assert app.wait_until(lambda health: health["state"] != "loading")["state"] == "ready", app.health()
        yield app
    finally:
        stop_app(app)


@pytest.fixture(scope="module")
def slow_app(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The same slow model on both sides."""
    content = facts(precision="float32", precisions=[precision("float32", 1, 1)])
    folder = tmp_path_factory.mktemp("slow-space") / "app"
    deploy(folder, SimpleNamespace(original_onnx=slow_model), content)
    with running_app(folder, PRUNED_MODEL=str(slow_model)) as app:
        yield app


@pytest.fixture(scope="session")
def running(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """One app with both models, shared by the tests that only ask it something."""
    folder = deploy(tmp_path_factory.mktemp("space") / "app", pair)
    app = start_app(folder, PRUNED_MODEL=str(pair.pruned_onnx))
    try:
        assert app.wait_until(lambda health: health["state"] != "loading")["state"] == "ready"
        yield app
    finally:
        stop_app(app)


def load_model(engine: str, folder: Path, name: str = "float32") -> Any:
    """The model of a folder in one precision, by an engine of the app."""
    compare = load_module("compare")
    nothing = compare.Stored("space", "")
    wanted = compare.Precision(name, of_precision(name).file, nothing, nothing)
    return load_module(f"{engine}_engine").load(folder, "", wanted)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above; a conftest.py cannot be imported from under --import-mode=importlib."""
    return SimpleNamespace(
        load_module=load_module, load_model=load_model, facts=facts, precision=precision, deploy=deploy,
        start_app=start_app, stop_app=stop_app, running_app=running_app, App=App,
    )  # fmt: skip
