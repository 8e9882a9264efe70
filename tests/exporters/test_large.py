"""A model above 2 GB, where protobuf's limit and a second file of weights come in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.runtime.artifacts import free_memory

pytestmark = pytest.mark.slow

# About 680M parameters in float32 without two of its layers; Optimum's export takes six times their 2.7 GB.
SHAPE: dict[str, Any] = {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 27, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
MEMORY = 18_000_000_000


def gradmap_hub(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "gradmap_hub", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_above_2_gb_is_exported_once_and_generates(
    tmp_path: Path, folder_of: Callable[..., Path], text_file: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    free = free_memory()
    if free is not None and free < MEMORY:
        pytest.skip(f"needs {MEMORY / 1e9:.0f} GB of memory, {free / 1e9:.1f} are free")
    original = folder_of(tmp_path / "original", "llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)).save_pretrained(original)
    folder = tmp_path / "large"
    few = ("--samples", "4", "--seq-len", "64", "--eval-rows", "2", "--compensation", "none")
    gradmap_hub("prune", str(original), str(folder), "--drop", "7,12", "--calibration", str(text_file), *few)
    count = json.loads((folder / "gradmap.json").read_text())["parameters"]["after"]
    assert count > 650_000_000

    gradmap_hub("export", str(folder), "--to", "onnx,int8", "--text", str(text_file))
    onnx = folder / "onnx"
    sizes = {file.name: file.stat().st_size for file in onnx.iterdir()}
    assert sizes["model.onnx_data"] > 2 << 30 and sizes["model.onnx"] < 50_000_000
    # The embedding is stored once, and nothing else is left in the folder or beside it.
    assert sizes["model.onnx"] + sizes["model.onnx_data"] < 1.02 * 4 * count
    assert sum(sizes.values()) < 1.02 * 4 * count + 0.4 * 4 * count
    beside = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000_000]
    assert {path.parent.name for path in beside} == {"original", "large", "onnx"}

    said = {
        artifact: json.loads(
            gradmap_hub("generate", str(folder), "The", "-n", "8", "-t", "0", "--artifact", artifact, "--json")
        )
        for artifact in ("fp32", "int8")
    }
    assert all(answer["completion_tokens"] for answer in said.values())
