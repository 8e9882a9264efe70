"""A tiny real pair of models, deployed as a Space would be, for the tests of `spaces/`."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPACES = ROOT / "spaces"
# Copied into every Space beside what lies in spaces/.
PROMPTING = ROOT / "gradmap_hub" / "prompting.py"


def load_module(name: str) -> ModuleType:
    """A module of spaces/, by path: the folder is content and must not be importable as a package.

    Its modules import each other as siblings, as they do in a Space, so the folder is on the path for
    as long as that takes.
    """
    if name in sys.modules:
        return sys.modules[name]
    file = PROMPTING if name == PROMPTING.stem else SPACES / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(SPACES))
    if name != PROMPTING.stem:
        load_module(PROMPTING.stem)  # found by its name from then on
    try:
        sys.modules[name] = module
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SPACES))
    return module


def facts(**changes: Any) -> dict[str, Any]:
    """A compare.json that fits the tiny pair."""
    return {
        "schema_version": 1,
        "title": "Tiny, one layer lighter",
        "runtime": "onnx",
        "precision": "float32",
        "original": {
            "name": "someone/tiny", "repo_id": "someone/tiny", "revision": None, "stored": "space",
            "path": "original",
        },
        "pruned": {"name": "someone/tiny-pruned", "repo_id": None, "revision": None, "path": "onnx"},
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
    for file in [*SPACES.glob("*.py"), SPACES / "style.css", PROMPTING]:
        if file.name != f"{unused}_engine.py":
            shutil.copy(file, folder)
    shutil.copytree(tiny.original_onnx, folder / "original")
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


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


def start_app(folder: Path, **variables: str) -> App:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dropped = ("SYSTEM", "SPACE_ID", "GRADIO_", "HF_", "ORIGINAL_", "PRUNED_", "HTTP_PROXY", "HTTPS_PROXY")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", **variables}
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    return App(f"http://127.0.0.1:{port}", process, log)


def stop_app(app: App) -> int:
    app.process.terminate()
    try:
        return app.process.wait(30)
    except subprocess.TimeoutExpired:
        app.process.kill()
        raise


@pytest.fixture(scope="session")
def running(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """One app with both models, shared by the tests that only ask it something."""
    folder = deploy(tmp_path_factory.mktemp("space") / "app", tiny)
    app = start_app(folder, PRUNED_MODEL=str(tiny.pruned_onnx))
    try:
        assert app.wait_until(lambda health: health["state"] != "loading")["state"] == "ready"
        yield app
    finally:
        stop_app(app)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above; a conftest.py cannot be imported from under --import-mode=importlib."""
    return SimpleNamespace(load_module=load_module, facts=facts, deploy=deploy, start_app=start_app, stop_app=stop_app)
