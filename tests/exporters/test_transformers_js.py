"""Every file by its dtype name in the real transformers.js, on node: the tokens that PyTorch or ONNX Runtime gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai")

from gradmap_hub.exporters import export
from gradmap_hub.exporters.alias import main as alias
from gradmap_hub.exporters.graph import Graph
from gradmap_hub.exporters.session import Session
from gradmap_hub.formats import FORMATS
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.tokenizer import repeat_template

SCRIPTS = Path(__file__).parents[1] / "js"
# transformers.js' name for each format, and further names of the same file.
DTYPES = {"onnx": ["fp32"], "int8": ["q8", "int8"], "int4": ["q4"], "fp16": ["fp16"]}
TOKENS = 32


@pytest.fixture(scope="session")
def transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`transformers_js(folder, dtypes=..., ids=..., ...)`: see generate.mjs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node on this machine (apt-get install nodejs npm)")
    home = tmp_path_factory.mktemp("js")
    for file in SCRIPTS.iterdir():
        if file.is_file():
            shutil.copy(file, home)
    # Without its script, onnxruntime-node does not look for the libraries of CUDA elsewhere; those for CPUs are in it.
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=home, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install transformers.js: {installed.stderr.strip().splitlines()[-1:]}")

    def run(folder: Path, **request: Any) -> dict[str, Any]:
        done = subprocess.run(
            ["node", "generate.mjs", str(folder.parent), folder.name, json.dumps({"chat": None} | request)],
            cwd=home,
            capture_output=True,
            text=True,
            env={**os.environ, "NODE_ENV": "test"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


def greedy(graph: Path, ids: np.ndarray, head_size: int, end: int) -> list[int]:
    """The tokens that the graph gives in plain ONNX Runtime, up to token `end`."""
    session = Session(graph, head_size)
    past, found = session.empty(), []
    for _ in range(TOKENS):
        logits, past = session.step(ids, past)
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == end:
            break
        ids = np.array([[found[-1]]], np.int64)
    return found


def check_folder(folder: Path, run: Callable[..., Any], ids: np.ndarray, head_size: int, formats: list[str]) -> None:
    dtypes = [None, *(dtype for name in formats for dtype in DTYPES[name])]
    found = run(folder, dtypes=dtypes, ids=ids[0].tolist(), tokens=TOKENS)["tokens"]
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    expected = {name: greedy(folder / "onnx" / FORMATS[name].file, ids, head_size, end) for name in formats}
    assert found["default"] == expected["onnx"]  # fp32 on node
    for name in formats:
        for dtype in DTYPES[name]:
            assert found[dtype] == expected[name], dtype


@pytest.mark.slow  # tests/spaces/test_static.py runs one in Chromium
def test_a_folder_runs_by_every_dtype_name(
    shop: Callable[..., SimpleNamespace], tokenizer: Any, tmp_path: Path, transformers_js: Callable[..., Any]
) -> None:
    made = shop(tied=True)
    folder = tmp_path / "model"
    shutil.copytree(made.checkpoint, folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    repeat_template(folder)
    for name in ("onnx", "int8", "int4", "fp16"):
        export.export(
            name, made.checkpoint, folder / "onnx", rows=made.rows, work=made.work, fit=made.fit, keep_failing=True
        )
    check_folder(folder, transformers_js, made.rows[:1, :12], 16, ["onnx", "int8", "int4", "fp16"])
    chat = [{"role": "user", "content": "hello"}]
    assert isinstance(transformers_js(folder, dtypes=[], ids=[], tokens=4, chat=chat)["chat"], str)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, row in ARCHITECTURES.items() if row.genai and name != "llama"])
def test_the_families_whose_card_names_transformers_js(
    shop: Callable[..., SimpleNamespace], family: str, tmp_path: Path, transformers_js: Callable[..., Any]
) -> None:
    made = shop(family)
    folder = tmp_path / "model"
    shutil.copytree(made.checkpoint, folder)
    for name in ("onnx", "int8"):
        export.export(name, made.checkpoint, folder / "onnx", rows=made.rows, work=made.work, keep_failing=True)
    check_folder(folder, transformers_js, made.rows[:1, :12], 16, ["onnx", "int8"])


def test_the_width_of_the_cache_is_a_number(shop: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    made = shop(tied=True)
    for name in ("genai", "int8", "fp16"):
        export.export(name, made.checkpoint, tmp_path, rows=made.rows, work=made.work, fit=made.fit, keep_failing=True)
        model = Graph.load(tmp_path / FORMATS[name].file).model
        cache = [value for value in [*model.graph.input, *model.graph.output] if ".key" in value.name]
        assert len(cache) == 2 * 5
        for value in cache:
            _, heads, _, width = value.type.tensor_type.shape.dim
            assert (heads.dim_value, width.dim_value) == (2, 16), value.name


def test_a_graph_with_external_data_has_its_own_data_under_its_further_name(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    path = tmp_path / "model_int8.onnx"
    Graph(model, {"w": weight}).save(path, single_file_limit=1)
    assert alias(str(path), "model_quantized.onnx") == ["model_quantized.onnx", "model_quantized.onnx_data"]
    path.unlink()
    (tmp_path / "model_int8.onnx_data").unlink()
    again = Graph.load(tmp_path / "model_quantized.onnx")
    assert (again.weights["w"] == weight).all()


def test_the_chat_template_stands_where_transformers_js_reads_it(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
    repeat_template(tmp_path)  # without tokenizer_config.json, nothing to write
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    repeat_template(tmp_path)
    assert json.loads(config.read_text()) == {"eos_token": "</s>", "chat_template": "{{ messages }}\r\n"}
    config.write_text('{"chat_template": "own"}')
    repeat_template(tmp_path)
    assert config.read_text() == '{"chat_template": "own"}'  # the publisher's, untouched
