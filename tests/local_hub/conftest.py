"""A hub of its own for every test, and the real client pointed at it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from gradmap_hub.local_hub import LocalHub, Request

disable_progress_bars()

# What every exception of the client's HTTP library is: requests, httpx or httpx2.
HTTP_FAILURE: type[Exception] = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"][-1]


@pytest.fixture(autouse=True)
def by_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of 1.x and later does not ask whether the Hub speaks xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path: Path, point_client_at: Callable[[str], None]) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub") as running:
        point_client_at(running.url)
        yield running


@pytest.fixture
def start_hub(tmp_path: Path, point_client_at: Callable[[str], None]) -> Iterator[Callable[..., LocalHub]]:
    """Starts a hub with settings of its own; the client is pointed at the last one."""
    with ExitStack() as stack:

        def start(**settings: Any) -> LocalHub:
            running = stack.enter_context(LocalHub(tmp_path / "own-hub", **settings))
            point_client_at(running.url)
            return running

        yield start


@pytest.fixture
def on() -> Callable[[LocalHub, str], list[Request]]:
    """The requests that one route of a hub answered."""
    return lambda hub, route: [request for request in hub.requests if request.route == route]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second and more before it tries again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def ada(hub: LocalHub) -> HfApi:
    """A user with a write token, and a member of the organisation acme."""
    return HfApi(endpoint=hub.url, token=hub.add_user("ada", orgs=["acme"]))


@pytest.fixture
def bob(hub: LocalHub) -> HfApi:
    """Somebody else, with a write token."""
    return HfApi(endpoint=hub.url, token=hub.add_user("bob"))


@pytest.fixture
def anonymous(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model folder with every kind of file: text, LFS by name, LFS by content, empty."""
    root = tmp_path / "model"
    (root / "onnx").mkdir(parents=True)
    (root / "assets").mkdir()
    (root / "README.md").write_text("---\nlicense: mit\nbase_model: acme/base\n---\n# Tiny\n")
    (root / "LICENSE").write_text("MIT License\n")
    (root / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (root / "model.safetensors").write_bytes(os.urandom(3_000_000))
    (root / "onnx" / "model.onnx").write_bytes(os.urandom(20_000))
    (root / "assets" / "plot one.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00" + os.urandom(500))
    (root / "empty.txt").write_bytes(b"")
    return root


@pytest.fixture
def sums() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a folder, by relative path."""

    def compute(root: Path) -> dict[str, str]:
        return {
            file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in root.rglob("*")
            if file.is_file() and ".cache" not in file.relative_to(root).parts
        }

    return compute
