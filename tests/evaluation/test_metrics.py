"""Perplexity, agreement and divergence against plain loops over transformers, and the intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradmap_hub.evaluation import metrics as evaluation_module
from gradmap_hub.evaluation.metrics import (
    compare_rows,
    difference_interval,
    kl_divergence,
    mean_interval,
    perplexity,
    ratio_interval,
    reference_states,
    top1_agreement,
)
from gradmap_hub.models import decoder as decoder_module

TOKENS = 40
METRICS = {"agreement": top1_agreement, "divergence": kl_divergence}


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


def test_interval_of_a_difference_is_paired() -> None:
    original, changed = some_losses()
    low, high = difference_interval(original, changed)
    mean = sum(b - a for a, b in zip(original, changed, strict=True)) / len(original)
    assert low < mean < high
    assert [math.exp(low), math.exp(high)] == pytest.approx(ratio_interval(original, changed))
    assert difference_interval(original, [loss - 0.25 for loss in original]) == pytest.approx([-0.25, -0.25])
    assert mean_interval([0.5] * 5) == [0.5, 0.5]


def test_intervals_of_many_documents_need_little_memory() -> None:
    """Ten thousand values, drawn in parts: about what a normal approximation gives."""
    values = [float(number % 2) for number in range(10_000)]
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(0.5, abs=2e-3) and high - low == pytest.approx(2 * 1.96 * 0.005, rel=0.1)


def plain_comparison(original: Any, pruned: Any, ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per row, top-1 agreement and mean KL(original || pruned), token by token in float64."""
    agreement, divergence = [], []
    for row in ids:
        with torch.no_grad():
            p, q = (
                model(input_ids=row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
                for model in (original, pruned)
            )
        agreement.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return agreement, divergence


def test_agreement_and_divergence_equal_a_plain_comparison(
    family: str,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    random_rows: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation_module, "LOGIT_CHUNK", 16)
    model = model_of(family)
    ids = random_rows(3, TOKENS)
    decoder = decoder_of(model, TOKENS)
    losses, states = reference_states(decoder, ids)
    assert losses == decoder.losses(ids) and states.shape == (3, TOKENS, decoder.output.in_features)
    pruned = prune_copy(model, (1, 3))
    done: list[int] = []
    found = compare_rows(decoder_of(pruned, TOKENS), ids, states, decoder.output, METRICS, done.append)
    agreement, divergence = plain_comparison(model, pruned, ids)
    assert found.metrics["agreement"] == pytest.approx(agreement)
    assert found.metrics["divergence"] == pytest.approx(divergence, rel=1e-4)
    assert found.losses == pytest.approx(decoder.losses(ids, [0, 2, 4]), rel=1e-6)
    assert max(found.metrics["agreement"]) < 1 and min(found.metrics["divergence"]) > 0 and len(done) == 3
    same = compare_rows(decoder, ids, states, decoder.output, METRICS)
    assert same.metrics["agreement"] == [1.0] * 3 and max(same.metrics["divergence"]) < 1e-6
