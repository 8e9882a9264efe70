"""Whole prunes of tiny folders through the pipeline: the ways to compute give the same checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmap_hub.config import METRICS, PruneConfig, paper_preset
from gradmap_hub.errors import UsageError
from gradmap_hub.models.decoder import choose_precision
from gradmap_hub.pipeline.inspect import inspect
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.pruning.candidates import RANKINGS, candidates, register
from gradmap_hub.record import RunRecord

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 32, "eval_rows": 4}


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def pruned(model: Path, output: Path, text: Path, **options: Any) -> RunRecord:
    settings = {"layers": 2, **SMALL, **options}
    return prune(str(model), output, PruneConfig(calibration=(str(text),), **settings))


@pytest.mark.slow
@pytest.mark.long
def test_low_memory_gives_the_same_checkpoint(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    plain = pruned(tiny_folder, tmp_path / "plain", text_file)
    streamed = pruned(tiny_folder, tmp_path / "streamed", text_file, low_memory=True)
    assert streamed.removed == plain.removed and streamed.parameters == plain.parameters
    assert streamed.compensation == plain.compensation
    assert [layer.score for layer in streamed.layers] == [layer.score for layer in plain.layers]
    assert streamed.verification is not None and streamed.verification.keys_match
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "streamed")]
    assert configs[0] == configs[1]
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "streamed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow  # also of push, in tests/cli/test_push.py
def test_the_same_seed_gives_the_same_bytes(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    pruned(tiny_folder, tmp_path / "first", text_file, seed=3)
    pruned(tiny_folder, tmp_path / "second", text_file, seed=3)
    assert sums(tmp_path / "first") == sums(tmp_path / "second") != {}


@pytest.mark.slow
@pytest.mark.long
def test_bfloat16_weights_may_be_computed_in_bfloat16(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tiny_folder)
    folder = tiny_folder
    record = pruned(folder, tmp_path / "result", text_file, compute="bfloat16", drop=(1, 3), layers=None)
    exact = pruned(folder, tmp_path / "exact", text_file, compute="float32", drop=(1, 3), layers=None)
    assert record.dtype == exact.dtype == "bfloat16"
    for half, single in zip(record.layers, exact.layers, strict=True):
        assert half.score == pytest.approx(single.score, rel=0.05)


@pytest.mark.slow
def test_the_paper_preset_makes_one_correction_at_most(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = paper_preset(PruneConfig(layers=2, calibration=(str(text_file),), **SMALL))
    record = prune(str(tiny_folder), tmp_path / "paper", config)
    assert record.metric == "gradient" and len(record.candidates) == 1
    assert len(record.compensation.corrections) <= 1
    assert {trial.kind for trial in record.compensation.trials} == {"projection"}


@pytest.fixture
def toy_ranking() -> Iterator[str]:
    """A ranking from outside of the package: the first layers go."""
    register("toy", lambda _scores, count: list(range(count)))
    yield "toy"
    del RANKINGS["toy"]
    METRICS.remove("toy")


@pytest.mark.slow
def test_a_registered_ranking_chooses_the_layers(
    toy_ranking: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    alone = pruned(tiny_folder, tmp_path / "alone", text_file, metric=toy_ranking)
    assert alone.metric == toy_ranking and alone.removed == [0, 1]
    assert [candidate.name for candidate in alone.candidates] == [toy_ranking]
    config = PruneConfig(layers=2, calibration=(str(text_file),), **SMALL)
    scores = inspect(str(tiny_folder), config, ratios=(0.4,)).scores
    assert candidates(scores, 2, "auto")[toy_ranking] == [0, 1]  # under auto it competes with the others


def test_an_unknown_ranking_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--metric must be one of auto, gradmap, gate, gradient, .*; got 'toy'"):
        PruneConfig(layers=2, metric="toy")


@pytest.mark.parametrize("low_memory", [False, True])
def test_inspect_says_what_would_go(low_memory: bool, tiny_folder: Path, text_file: Path) -> None:
    config = PruneConfig(layers=1, calibration=(str(text_file),), low_memory=low_memory, **SMALL)
    found = inspect(str(tiny_folder), config, ratios=(0.2, 0.4))
    assert len(found.scores.layers) == 5 and all(score > 0 for score in found.scores.gradient)
    assert [len(candidate.removed) for candidate in found.choices.values()] == [1, 2]


def test_precision() -> None:
    assert choose_precision("auto", "cpu", "float32", streamed=False) == (torch.float32, "cpu")
    assert choose_precision("bfloat16", "cpu", "bfloat16", streamed=True) == (torch.bfloat16, "cpu")
    assert choose_precision("float32", "cpu", "bfloat16", streamed=False)[0] == torch.float32
    with pytest.raises(UsageError, match="would round"):
        choose_precision("bfloat16", "cpu", "float32", streamed=False)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="CUDA"):
            choose_precision("auto", "cuda", "float32", streamed=False)
    with pytest.raises(UsageError, match="low-memory"):
        PruneConfig(layers=1, low_memory=True, device="cuda")
