"""A Hub of its own for every test, our side of it with waits that are written down instead of waited, and small folders
as `prune` writes them."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi, file_download
from huggingface_hub.utils import _http

from gradmap_hub import __version__
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.retry import Patience
from gradmap_hub.local_hub import LocalHub, Request
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import Base, CalibrationRecord, CompensationRecord, LayerDecision, RunRecord
from gradmap_hub.space.app import content_folder

BASE = "acme/base"
TARGET = "ada/small"
SPACE = "ada/small-compare"
CARD = f"""---
base_model: {BASE}
base_model_relation: finetune
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- pruned
model-index:
- name: small
  results:
  - task:
      type: text-generation
    dataset:
      name: wiki
      type: wiki
    metrics:
    - type: perplexity
      value: 12.5
---

# small
"""
SPACE_CARD = """---
title: small
sdk: gradio
sdk_version: "6.17.3"
app_file: app.py
---
"""


class Heard:
    """A reporter that remembers: `lines` of finished stages, `notes`, and bytes that were told while they went."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.told = 0
        self._title = ""

    def start(self, title: str) -> None:
        self._title = title

    def total(self, steps: int, *, unit: str = "") -> None: ...

    def advance(self, steps: int = 1) -> None:
        self.told += steps

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        self.lines.append(f"{self._title}: {note}")

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclasses.dataclass
class Side:
    """Our side of a Hub: one user's, with the waits it would have made."""

    hub: Hub
    api: HfApi
    heard: Heard
    waits: list[float]


def tensors(seed: int, size: int = 60_000) -> bytes:
    """A safetensors file of one random tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


WORDS = 500
TOKENIZER = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(WORDS)}, "unk_token": "w0"},
}  # fmt: skip


def graph(seed: int) -> bytes:
    """An ONNX file of some 16 kB that the runtime runs: random embeddings, multiplied with others, and a cache."""
    from onnx import TensorProto, helper, numpy_helper

    draw, real = np.random.default_rng(seed), TensorProto.FLOAT
    weights = [draw.standard_normal(shape).astype(np.float32) for shape in ((WORDS, 4), (4, WORDS))]
    past = [helper.make_tensor_value_info(f"past_key_values.0.{part}", real, [1, 1, "p", 4]) for part in CACHE]
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["state"]),
        helper.make_node("MatMul", ["state", "head"], ["logits"]),
        helper.make_node("Unsqueeze", ["state", "axis"], ["new"]),
        *(helper.make_node("Concat", [f"past_key_values.0.{part}", "new"], [f"present.0.{part}"], axis=2)
          for part in CACHE),
    ]  # fmt: skip
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "t"]),
         helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "s"]), *past],
        [helper.make_tensor_value_info("logits", real, [1, "t", WORDS]),
         *(helper.make_tensor_value_info(f"present.0.{part}", real, [1, 1, "n", 4]) for part in CACHE)],
        [numpy_helper.from_array(weights[0], "embeddings"), numpy_helper.from_array(weights[1], "head"),
         numpy_helper.from_array(np.array([1]), "axis")],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


CACHE = ("key", "value")


def record_of(**changes: Any) -> RunRecord:
    """The record of a run that took one of three layers out."""
    record = RunRecord(
        schema_version=1,
        gradmap_hub=__version__,
        command="gradmap-hub push acme/base --layers 1",
        name="small",
        base=Base(BASE, BASE, "main", "c" * 40, "apache-2.0"),
        layers=[LayerDecision(index, 1.0 + index, index != 1, "") for index in range(3)],
        removed=[1],
        ratio=1 / 3,
        parameters=BeforeAfter(300, 200),
        bytes=BeforeAfter(600, 400),
        metric="gradient",
        schedule="oneshot",
        calibration=CalibrationRecord("wiki", 4, 128, 32, "0" * 64),
        compensation=CompensationRecord(False),
        seed=0,
        target=TARGET,
        space=SPACE,
    )
    return dataclasses.replace(record, **changes)


def write_folders(root: Path, *, seed: int = 0, record: RunRecord | None = None, name: str = "small") -> Path:
    """A model folder and the Space folder beside it, with files of every kind that is published."""
    model, space = root / name, root / f"{name}-space"
    (model / "onnx").mkdir(parents=True)
    (model / "assets").mkdir()
    (space / "original").mkdir(parents=True)
    (record or record_of()).write(model)
    (model / "README.md").write_text(CARD)
    (model / "LICENSE").write_text("You may do with it what you like.\n")
    (model / "config.json").write_text('{"model_type": "llama"}')
    for folder in (model, space / "original"):
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (model / "model.safetensors").write_bytes(tensors(seed))
    (model / "onnx" / "model.onnx").write_bytes(graph(seed + 1))
    (model / "assets" / "layers.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00" + random.Random(seed + 2).randbytes(500))
    (space / "README.md").write_text(SPACE_CARD)
    shutil.copyfile(content_folder() / "app.py", space / "app.py")
    shutil.copyfile(content_folder() / "requirements-onnx.txt", space / "requirements.txt")
    facts = {"pruned": {"repo_id": TARGET}, "original": {"name": BASE}}
    (space / "compare.json").write_text(json.dumps(facts))
    (space / "original" / "LICENSE").write_text("You may do with it what you like.\n")
    (space / "original" / "model.onnx").write_bytes(graph(seed + 3))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folders(tmp_path)


@pytest.fixture(autouse=True)
def client_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the client's own waits away; ours are written down."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0))


@pytest.fixture
def server(tmp_path: Path, point_client_at: Callable[[str], None]) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub") as running:
        point_client_at(running.url)
        running.add_user("acme-owner", orgs=["acme"])
        yield running


@pytest.fixture
def as_user(server: LocalHub) -> Callable[..., Side]:
    def side(name: str = "ada", role: Any = "write", *, scopes: Any = (), **patience: Any) -> Side:
        token = server.add_user(name, role, scopes=scopes)
        waits: list[float] = []
        heard = Heard()
        patient = Patience(sleep=waits.append, draw=lambda: 0.0, **patience)
        hub = Hub(server.url, token, patience=patient).reporting(heard)
        return Side(hub, HfApi(endpoint=server.url, token=token), heard, waits)

    return side


@pytest.fixture
def ada(as_user: Callable[..., Side]) -> Side:
    return as_user()


@pytest.fixture
def sent() -> Callable[[list[Request]], list[Request]]:
    """The requests that carried an LFS object."""
    return lambda requests: [entry for entry in requests if entry.route in ("lfs-put", "lfs-part")]


def remote_bytes(side: Side, repo_id: str, kind: str, cache: Path, revision: str | None = None) -> dict[str, bytes]:
    """Every file of a repository, fetched afresh, without what the Hub puts there."""
    copy = Path(side.api.snapshot_download(repo_id, repo_type=kind, revision=revision, cache_dir=cache))
    found = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    found.pop(".gitattributes", None)
    return found


def local_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
