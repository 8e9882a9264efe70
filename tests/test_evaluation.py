"""Perplexity against a plain loop over transformers, and the interval of a ratio."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradmap_hub import decoder as decoder_module
from gradmap_hub.evaluation import perplexity, ratio_interval

TOKENS = 40


def plain_perplexity(model: Any, ids: torch.Tensor) -> float:
    """exp of the mean over all predicted tokens, token by token in float64."""
    total, count = 0.0, 0
    for row in ids:
        with torch.no_grad():
            chances = model(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)
        for position in range(len(row) - 1):
            total -= float(chances[position, row[position + 1]])
            count += 1
    return math.exp(total / count)


def test_perplexity_equals_a_plain_loop(
    family: str,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    random_rows: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_module, "LOGIT_CHUNK", 16)
    model = model_of(family)
    ids = random_rows(3, TOKENS)
    decoder = decoder_of(model, TOKENS)
    done: list[int] = []
    losses = decoder.losses(ids, rows_done=done.append)
    assert len(losses) == len(done) == 3
    assert perplexity(losses) == pytest.approx(plain_perplexity(model, ids), rel=1e-6)
    pruned = perplexity(decoder.losses(ids, [0, 2, 4]))
    assert pruned == pytest.approx(plain_perplexity(prune_copy(model, (1, 3)), ids), rel=1e-6)
    assert pruned != pytest.approx(perplexity(losses), rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_of_rows() -> None:
    assert perplexity([math.log(8.0)] * 5) == pytest.approx(8.0)
    assert perplexity([math.log(2.0), math.log(32.0)]) == pytest.approx(8.0)  # geometric, not arithmetic, mean


def some_losses() -> tuple[list[float], list[float]]:
    draw = random.Random(3)
    original = [3.0 + draw.gauss(0, 0.5) for _ in range(24)]
    return original, [loss + 0.4 + draw.gauss(0, 0.2) for loss in original]


def test_interval_brackets_the_ratio_and_is_deterministic() -> None:
    original, changed = some_losses()
    low, high = ratio_interval(original, changed)
    assert low < perplexity(changed) / perplexity(original) < high
    assert [low, high] == ratio_interval(original, changed)
    assert [low, high] != ratio_interval(original, changed, seed=1)
    # about what a normal approximation gives: the bootstrap is not merely some interval
    differences = torch.tensor(changed).double() - torch.tensor(original).double()
    half = 1.96 * float(differences.std()) / len(original) ** 0.5
    assert math.log(high) - math.log(low) == pytest.approx(2 * half, rel=0.2)


def test_interval_is_paired() -> None:
    """Rows differ far more from each other than the models do on one row; only the latter counts."""
    original = [1.0, 9.0, 3.0, 7.0, 5.0, 2.0]
    low, high = ratio_interval(original, [loss + 0.5 for loss in original])
    assert low == pytest.approx(math.exp(0.5)) and high == pytest.approx(math.exp(0.5))
    assert ratio_interval(original, original) == [1.0, 1.0]
