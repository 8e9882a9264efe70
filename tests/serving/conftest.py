"""A tiny real Llama, exported to ONNX and served over real sockets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

CONTEXT = 1024
NAME = "someone/tiny"


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory, export_tiny: Callable[..., None]) -> Path:
    """A folder as `push` makes one, as far as the runtime looks. Greedy answers never end by themselves."""
    root = tmp_path_factory.mktemp("serving")
    export_tiny(root / "checkpoint", root / "served", 2, endless=True)
    return root / "served"


@pytest.fixture(scope="session")
def tiny_int8(tiny_onnx: Path) -> Path:
    """The same in int8 on GenAI's graph, on which texts take their steps together."""
    pytest.importorskip("onnx", reason="of the extra onnx; beside transformers 5 it is in another environment")
    from gradmap_hub.exporters import genai
    from gradmap_hub.exporters.quantized import quantise
    from gradmap_hub.exporters.recipes import INT8

    folder = Path(shutil.copytree(tiny_onnx, tiny_onnx.parent / "served-int8"))
    (folder / "model.onnx").unlink()
    built = genai.build(tiny_onnx.parent / "checkpoint", tiny_onnx.parent / "built")
    quantise(built, folder / "model_int8.onnx", INT8[0], None)
    return folder


@pytest.fixture(scope="session")
def batching(tiny_int8: Path) -> Any:
    from gradmap_hub import runtime

    return runtime.load(tiny_int8, threads=1)


@pytest.fixture(scope="session")
def model(tiny_onnx: Path) -> Any:
    from gradmap_hub import runtime

    return runtime.load(tiny_onnx, threads=1)


class Paced:
    """The real model, each step of which takes at least so many seconds: tests of waiting must know how long."""

    def __init__(self, model: Any, seconds: float) -> None:
        self._model = model
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def batch(self, rows: int, **options: Any) -> Any:
        return _PacedBatch(self._model.batch(rows, **options), self._seconds)


class _PacedBatch:
    def __init__(self, batch: Any, seconds: float) -> None:
        self._batch = batch
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def step(self, answers: Sequence[Any]) -> list[Any]:
        time.sleep(self._seconds * len(answers))
        return self._batch.step(answers)


@contextmanager
def serving(model: Any, *, pace: float = 0.0, **settings: Any) -> Iterator[Any]:
    """A running server for a model, with its address as `url`."""
    from gradmap_hub.serving.server import Server
    from gradmap_hub.serving.settings import Settings

    options: dict[str, Any] = {"port": 0, "name": NAME} | settings
    with Server(Paced(model, pace) if pace else model, Settings(**options)) as server:
        yield server


def alone(model: Any, prompt_ids: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
    """What the engine says without any server."""
    generation = model.start(prompt_ids, max_tokens=max_tokens, stop=tuple(stop))
    while generation.finish_reason is None:
        generation.advance()
    text = generation.text
    generation.close()
    return text


def events(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events; [DONE] stays a string."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def is_refusal(body: bytes) -> bool:
    """Whether an answer is an error as the OpenAI API words it."""
    error = json.loads(body)["error"]
    return (
        set(error) == {"message", "type", "param", "code"}
        and all(isinstance(error[name], str) and error[name] for name in ("message", "type"))
        and all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    )


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def asked(web: httpx.Client, route: str, **body: Any) -> Any:
    """The answer to a greedy request."""
    answer = web.post(route, json={"model": NAME, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@contextmanager
def command(folder: Path, *options: str) -> Iterator[Any]:
    """`gradmap-hub serve` as a process; yields it and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmap_hub", "serve", str(folder), "--port", "0", "--name", NAME, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.communicate(timeout=20)[1]
        yield SimpleNamespace(process=process, url=url)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def served(model: Any) -> Iterator[Any]:
    """One server with the default limits, for tests that only ask it something."""
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def web(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above; a conftest.py cannot be imported from under --import-mode=importlib."""
    return SimpleNamespace(
        serving=serving, alone=alone, events=events, is_refusal=is_refusal, wait_until=wait_until, command=command,
        asked=asked, name=NAME, context=CONTEXT,
    )  # fmt: skip
