"""Every format of tiny real models: written, checked, run by plain onnxruntime and by GenAI, gone when it is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai")

from gradmap_hub.errors import MissingExtra, UsageError, VerificationError
from gradmap_hub.exporters import export, gate, inputs
from gradmap_hub.exporters.export import Exported
from gradmap_hub.exporters.graph import Graph
from gradmap_hub.exporters.inputs import Inputs
from gradmap_hub.exporters.recipes import LADDERS
from gradmap_hub.exporters.session import Session
from gradmap_hub.formats import FORMATS, Limits, graph_names

Shop = Callable[..., SimpleNamespace]


def exported(shop: SimpleNamespace, name: str, destination: Path, **options: Any) -> Exported:
    return export.export(name, shop.checkpoint, destination, rows=shop.rows, fit=shop.fit, work=shop.work, **options)


def for_genai(shop: SimpleNamespace) -> list[str]:
    """What stands beside the graphs for GenAI."""
    return ["genai_config.json", *(name for name in export.GENAI_TOKENIZER if (shop.checkpoint / name).is_file())]


def node_types(path: Path) -> list[str]:
    return [node.op_type for node in Graph.load(path).model.graph.node]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_format_passes_and_is_a_whole_file(shop: Shop, tmp_path: Path, tied: bool) -> None:
    made = shop(tied=tied)
    onnx = tmp_path / "model" / "onnx"
    results = {name: exported(made, name, onnx) for name in ("genai", "fp16", "int8", "int4")}
    for name, result in results.items():
        assert result.check.passed and not result.note, result.check
        assert result.files == graph_names(FORMATS[name])[: 1 + bool(FORMATS[name].alias)] and result.base == "genai"
        path = onnx / FORMATS[name].file
        assert path.stat().st_size == result.bytes and stat.S_IMODE(path.stat().st_mode) == 0o644
        assert result.check.provider == "CPUExecutionProvider" and result.check.greedy_tokens == 256
    assert results["genai"].check.parity().greedy_tokens_equal
    assert results["genai"].check.max_logit_difference_with_past <= 1e-3
    assert abs(results["int8"].check.ratio - 1) < 0.02
    assert sorted(path.name for path in onnx.iterdir()) == sorted(
        [*(row.file for name, row in FORMATS.items() if name != "onnx"), "model_quantized.onnx", *for_genai(made)]
    )
    assert json.loads((onnx / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model_int8.onnx"
    assert not (tmp_path / "model" / "onnx.partial").exists()
    float32 = results["genai"].bytes
    assert results["fp16"].bytes < 0.55 * float32
    assert results["int8"].bytes < 0.45 * float32 and results["int4"].bytes < results["int8"].bytes


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_embedding_is_stored_once_and_never_in_float(shop: Shop, tmp_path: Path, tied: bool) -> None:
    made = shop(tied=tied)
    exported(made, "int8", tmp_path / "onnx")
    graph = Graph.load(tmp_path / "onnx" / "model_int8.onnx")
    vocabulary = [weight for weight in graph.weights.values() if weight.ndim == 3 and weight.shape[0] == 300]
    assert len(vocabulary) == (1 if tied else 2)
    assert all(weight.dtype == np.uint8 for weight in vocabulary)
    floats = [weight for weight in graph.weights.values() if weight.dtype == np.float32 and weight.shape[0] == 300]
    assert floats and all(weight.shape == (300, 1) for weight in floats)  # the scales of blocks of 64


def test_plain_onnxruntime_gives_the_same_with_and_without_past(shop: Shop, tmp_path: Path) -> None:
    made = shop(tied=True)
    exported(made, "int8", tmp_path / "onnx")
    session = Session(tmp_path / "onnx" / "model_int8.onnx", head_size=16)
    ids = made.rows[:1, :40]
    whole = session.logits(ids)
    _, past = session.step(ids[:, :25], session.empty())
    step, past = session.step(ids[:, 25:], past)
    assert session.key_values == 10 and np.abs(whole[:, 25:] - step).max() < 1e-3
    assert all(value.shape == (1, 2, 40, 16) for value in past.values())


def test_genai_loads_the_folder_and_writes_what_pytorch_writes(shop: Shop, tokenizer: Any, tmp_path: Path) -> None:
    import onnxruntime_genai as og
    import torch
    from transformers import AutoModelForCausalLM

    made = shop(tied=True)
    onnx, checkpoint, text = tmp_path / "onnx", tmp_path / "checkpoint", "hello world"
    shutil.copytree(made.checkpoint, checkpoint)
    tokenizer.save_pretrained(checkpoint)
    for name in ("genai", "int8"):
        export.export(name, checkpoint, onnx, rows=made.rows, work=tmp_path / "work")
    prompt = made.rows[0, :12]
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32)
    expected = model.generate(
        torch.from_numpy(prompt[None]), max_new_tokens=20, do_sample=False, temperature=None, pad_token_id=0
    )[0].numpy()
    assert og.Tokenizer(og.Model(str(onnx))).encode(text).tolist() == tokenizer(text)["input_ids"]
    for file in (None, "model_genai.onnx"):
        config = og.Config(str(onnx))
        if file is not None:
            config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
        loaded = og.Model(config)
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=len(expected), do_sample=False)
        generator = og.Generator(loaded, params)
        generator.append_tokens(prompt.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = np.array(generator.get_sequence(0))
        if file is not None:  # int8 may differ somewhere
            assert found.tolist() == expected.tolist()
        else:
            assert found[:12].tolist() == prompt.tolist() and len(found) > 12


def test_a_spoiled_block_fails_and_the_file_is_gone(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shop(tied=True)
    call = inputs.call

    def spoiling(module: str, arguments: dict[str, Any]) -> Any:
        done = call(module, arguments)
        if module == "quantized":
            spoil(Path(arguments["destination"]))
        return done

    onnx = tmp_path / "onnx"
    exported(made, "int8", onnx)
    monkeypatch.setattr(inputs, "call", spoiling)
    result = exported(made, "int8", onnx)
    assert not result.check.passed and "perplexity" in result.check.reason and "deleted" in result.note
    assert result.files == [] and len(result.tries) == len(LADDERS["int8"])
    assert not list(tmp_path.rglob("model_*")) and not (onnx / "genai_config.json").exists()
    kept = exported(made, "int8", onnx, keep_failing=True)
    assert not kept.check.passed and kept.files == ["model_int8.onnx", "model_quantized.onnx"]
    assert "as requested" in kept.note
    assert (onnx / "model_int8.onnx").stat().st_size == kept.bytes
    assert (onnx / "model_int8.onnx").samefile(onnx / "model_quantized.onnx")


def spoil(path: Path) -> None:
    """Turn the high bit of a part of the head's codes."""
    graph = Graph.load(path)
    name = next(name for name in graph.weights if name.endswith("lm_head.MatMul.weight.codes"))
    codes = np.array(graph.weights[name])
    codes[:, :1] ^= 0x80
    graph.weights[name] = codes
    graph.save(path)


def test_a_graph_that_does_not_run_fails_in_words(shop: Shop, tmp_path: Path) -> None:
    made = shop(tied=True)
    exported(made, "int8", tmp_path / "onnx")
    shared = Inputs(made.checkpoint, made.work, made.rows, made.fit, None)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((tmp_path / "onnx" / "model_int8.onnx").read_bytes()[:-1000])
    result = shared.check(broken, FORMATS["int8"])
    assert not result.passed and "cannot run it" in result.reason
    layers = dataclasses.replace(result)  # the record keeps it: it must be JSON
    json.dumps(dataclasses.asdict(layers), allow_nan=False)
    other = gate.check(tmp_path / "onnx" / "model_int8.onnx", shared.reference(), shared.rows(), 4, 16, Limits(1.001))
    assert not other.passed and "key and value inputs" in other.reason


def test_better_settings_are_tried_in_order_and_all_are_told(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shop(tied=True)
    monkeypatch.setitem(FORMATS, "int4", dataclasses.replace(FORMATS["int4"], limits=Limits(perplexity=0.5)))
    result = exported(made, "int4", tmp_path / "onnx")
    expected = [recipe.name for recipe in LADDERS["int4"] if recipe.rounding != "regrid"]  # not from 4 bits
    assert [tried.recipe for tried in result.tries] == expected
    assert all(tried.bytes and tried.perplexity_ratio for tried in result.tries)
    assert "int8 is the better artifact" in result.note and not list(tmp_path.rglob("*.onnx"))
    plain, mixed, most = result.tries[0], result.tries[2], result.tries[-1]
    assert plain.bytes < mixed.bytes and mixed.bytes < most.bytes
    assert plain.settings["matrices_in_8_bits"] == [] and mixed.settings["matrices_in_8_bits"]
    assert mixed.settings["rounding"] == "gptq"


@pytest.mark.slow
def test_weights_that_come_from_four_bits_lose_nothing_more(shop: Shop, tmp_path: Path) -> None:
    """As a GGUF file's: 16 values per block of 32, their offset no whole number of steps. One matrix has been changed
    since."""
    from safetensors.numpy import load_file, save_file

    made = shop(tied=True)
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    changed = "model.layers.2.mlp.down_proj.weight"
    for name, weight in weights.items():
        if name.endswith("_proj.weight") and name != changed:
            blocks = weight.reshape(-1, 32)
            low = blocks.min(axis=1, keepdims=True)
            step = (blocks.max(axis=1, keepdims=True) - low) / 15
            weights[name] = (low + np.rint((blocks - low) / step) * step).reshape(weight.shape).astype(np.float32)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    recipe = next(recipe for recipe in LADDERS["int4"] if recipe.rounding == "regrid")
    shared = Inputs(checkpoint, tmp_path / "work", made.rows, None, None)
    lost = {}
    for tried in (LADDERS["int4"][0], recipe, LADDERS["int8"][0]):
        result = export._try(FORMATS["int4"], tried, shared, tmp_path / "model_q4.onnx")
        assert result is not None
        lost[tried.rounding, tried.bits] = result.check.max_logit_difference
        if tried is recipe:
            assert result.settings["matrices_in_8_bits"] == ["/model/layers.2/mlp/down_proj/MatMul"]
    assert lost["regrid", 4] < 0.4 * lost["nearest", 4] and lost["regrid", 4] < 2 * lost["nearest", 8]


@pytest.mark.slow
def test_a_model_the_builder_does_not_know_is_quantised_from_optimums_graph(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shop("qwen2", tied=True)  # some layers with a window, some without
    config = json.loads((made.checkpoint / "config.json").read_text())
    assert "some of its layers" in (export.supported("genai", config) or "")
    with pytest.raises(UsageError, match="window"):
        export.require("genai", config)
    result = exported(made, "int8", tmp_path / "onnx")
    assert result.base == "optimum" and result.check.passed, result.check
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model_int8.onnx", "model_quantized.onnx"}
    graph = Graph.load(tmp_path / "onnx" / "model_int8.onnx")
    assert sum(weight.shape[0] == 300 and weight.ndim == 3 for weight in graph.weights.values()) == 1


def test_optimums_graph_passes_the_same_check_and_leaves_the_others_alone(shop: Shop, tmp_path: Path) -> None:
    made = shop(tied=True)
    onnx = tmp_path / "onnx"
    int8 = exported(made, "int8", onnx)
    result = exported(made, "onnx", onnx)
    assert result.check.passed and result.base == "optimum" and result.files == ["model.onnx"], result.check
    names = {"config.json", "generation_config.json", "model.onnx", *int8.files, *for_genai(made)}
    assert {path.name for path in onnx.iterdir()} == names


def test_what_is_missing_or_unknown_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama", "hidden_size": 64}
    for name in FORMATS:
        export.require(name, config)
    with pytest.raises(UsageError, match="formats: onnx, int8, int4, genai"):
        export.require("gguf", config)
    with pytest.raises(UsageError, match="multiple of 16"):
        export.require("int4", {**config, "hidden_size": 72})
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "onnxruntime_genai" else find(name))
    with pytest.raises(MissingExtra):
        export.require("int8", config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}, None),
        ({"model_type": "phi3", "max_position_embeddings": 131072}, "LongRoPE"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"model_type": "mistral", "sliding_window": 4096}, None),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "window"),
        ({"model_type": "falcon"}, "falcon"),
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "gemma3_text"}, "gemma3_text"),
        ({"model_type": "gpt_oss"}, "gpt_oss"),
        ({"hidden_act": "tanh"}, "tanh"),
        ({"partial_rotary_factor": 0.5}, "rotary"),
    ],
)
def test_what_the_builder_would_get_wrong_is_known_from_the_config(changes: dict[str, Any], words: str | None) -> None:
    reason = export.supported("genai", {"model_type": "llama", "hidden_size": 64, **changes})
    assert reason is None if words is None else words in (reason or "")


def test_weights_above_the_limit_lie_beside_the_graph(shop: Shop, tmp_path: Path) -> None:
    made = shop(tied=True)
    exported(made, "int8", tmp_path / "onnx")
    graph = Graph.load(tmp_path / "onnx" / "model_int8.onnx")
    files = graph.save(tmp_path / "large.onnx", single_file_limit=10_000)
    assert [file.name for file in files] == ["large.onnx", "large.onnx_data"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
    ids = made.rows[:1, :20]
    expected = Session(tmp_path / "onnx" / "model_int8.onnx", 16).logits(ids)
    assert np.array_equal(Session(tmp_path / "large.onnx", 16).logits(ids), expected)
    again = Graph.load(tmp_path / "large.onnx")  # mapped, and written once more as one file
    assert len(again.save(tmp_path / "small.onnx")) == 1
    assert np.array_equal(Session(tmp_path / "small.onnx", 16).logits(ids), expected)


def test_the_checkpoint_is_exported_once_for_all_formats(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shop(tied=True)
    called: list[str] = []
    from gradmap_hub.exporters import genai

    for module in (inputs, genai):
        original = module.call

        def counting(name: str, arguments: dict[str, Any], original: Any = original) -> Any:
            called.append(name)
            return original(name, arguments)

        monkeypatch.setattr(module, "call", counting)
    work = tmp_path / "work"
    for name in ("genai", "int8", "int4"):
        export.export(name, made.checkpoint, tmp_path / "onnx", rows=made.rows, work=work)
    assert called.count("genai_worker") == 1 and called.count("reference") == 1
    export.clear(work)
    assert not work.exists()


def test_a_builder_that_fails_says_so_and_leaves_nothing(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(shop(tied=True).checkpoint, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(VerificationError, match="GenAI export failed"):
        export.export("int8", broken, tmp_path / "out" / "onnx", rows=shop(tied=True).rows, work=tmp_path / "work")
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "work").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_nothing_that_looks_whole(
    shop: Shop, tmp_path: Path, sign: signal.Signals
) -> None:
    made = shop(tied=True)
    np.save(tmp_path / "rows.npy", made.rows)
    script = (
        "import signal, sys, numpy as np\nfrom pathlib import Path\n"
        "from gradmap_hub.exporters import export\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as the command line does
        "root = Path(sys.argv[1])\n"
        "export.export('int8', Path(sys.argv[2]), root / 'model' / 'onnx',"
        " rows=np.load(root / 'rows.npy'), work=root / 'work')\n"
    )
    (tmp_path / "export.py").write_text(script)
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "export.py"), str(tmp_path), str(made.checkpoint)], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not (tmp_path / "model" / "onnx.partial").is_dir() and time.monotonic() < until:
        assert running.poll() is None, "the export ended before it was interrupted"
        time.sleep(0.05)
    assert (tmp_path / "model" / "onnx.partial").is_dir()
    time.sleep(1)  # the builder's process has begun
    os.kill(running.pid, sign)
    assert running.wait(30) != 0
    assert not list(tmp_path.rglob("*.onnx")) or sign == signal.SIGKILL
    if sign == signal.SIGINT:
        assert not (tmp_path / "model" / "onnx.partial").exists() and not (tmp_path / "model" / "onnx").exists()
    result = export.export("int8", made.checkpoint, tmp_path / "model" / "onnx", rows=made.rows, work=tmp_path / "work")
    assert result.check.passed and not (tmp_path / "model" / "onnx.partial").exists()


@pytest.mark.slow
def test_every_family(shop: Shop, tmp_path: Path, family: str) -> None:
    """Each passes in float32 and int8, whichever graph it has, beyond its window of 12 tokens."""
    options: dict[str, Any] = {"tied": True}
    if family == "phi3":
        options["original_max_position_embeddings"] = 512
    made = shop(family, **options)
    config = json.loads((made.checkpoint / "config.json").read_text())
    names = ("genai", "int8") if export.supported("genai", config) is None else ("int8",)
    for name in names:
        result = exported(made, name, tmp_path / "onnx")
        assert result.check.passed, (family, name, result.check)
    if "genai" in names:
        assert "GroupQueryAttention" in node_types(tmp_path / "onnx" / "model_int8.onnx")
