"""The 135M model with seven layers less: every format passes its check, at the size that it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai")

from gradmap_hub.exporters import export

pytestmark = [pytest.mark.slow, pytest.mark.real]

BENCH = Path(__file__).parents[2] / "build" / "bench"
REMOVED = range(12, 19)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut without correction: how a graph compares with its checkpoint does not depend on how good that is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (BENCH / "original" / "model.safetensors").is_file():
        pytest.skip("needs build/bench/original, as `make bench` leaves it")
    folder = tmp_path_factory.mktemp("real") / "pruned"
    model: Any = AutoModelForCausalLM.from_pretrained(BENCH / "original", dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if index not in REMOVED
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BENCH / "original").save_pretrained(folder)
    return folder


def rows(folder: Path, first: int, count: int) -> np.ndarray:
    """(count, 512) tokens of Wikipedia from token `first` on."""
    from tokenizers import Tokenizer

    text = (BENCH / "samples" / "wikipedia.txt").read_text(encoding="utf-8")[:400_000]
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return np.array(ids[first : first + 512 * count], np.int64).reshape(count, 512)


def test_the_135m_model(pruned: Path, tmp_path: Path) -> None:
    held_out, fit = rows(pruned, 0, 8), rows(pruned, 20_000, 16)
    results = {
        name: export.export(name, pruned, tmp_path / "onnx", rows=held_out, fit=fit, work=tmp_path / "work")
        for name in ("genai", "int8", "int4")
    }
    for name, result in results.items():
        assert result.check.passed, (name, result.note)
    size = (pruned / "model.safetensors").stat().st_size
    assert results["int8"].bytes <= 0.30 * size
    assert results["int4"].bytes <= 0.25 * size
    settings = json.dumps(results["int4"].settings)
    assert "regrid" in settings  # its weights come from a GGUF file of 4 bits
