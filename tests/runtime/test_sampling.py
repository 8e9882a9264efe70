"""One token from logits: each filter against its definition, and draws against their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradmap_hub.errors import UsageError
from gradmap_hub.runtime import sampling as module
from gradmap_hub.runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], dtype=np.float32))


def drawn(sampling: Sampling, count: int = 4000, prompt: tuple[int, ...] = ()) -> np.ndarray:
    """How often each token came. The penalty sees the prompt alone: a sampler of its own for every draw."""
    taken = [Sampler(Sampling(**{**vars(sampling), "seed": seed}), prompt).take(LOGITS.copy()) for seed in range(count)]
    return np.bincount(taken, minlength=len(LOGITS)) / count


def test_zero_temperature_is_greedy() -> None:
    assert [Sampler(Sampling(seed=seed), []).take(LOGITS) for seed in range(5)] == [1] * 5


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(1.0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(0.5), np.array([0.0025, 0.16, 0.01, 0.0625, 0.04]) / 0.275),
        (Sampling(1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(1.0, top_k=99), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(1.0, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(1.0, top_p=0.0), [0, 1, 0, 0, 0]),
        (Sampling(1.0, min_p=0.45), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(1.0, min_p=1.0), [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities(sampling: Sampling, wanted: Any) -> None:
    found, wanted = drawn(sampling), np.asarray(wanted)
    assert (found[wanted == 0] == 0).all()
    assert found == pytest.approx(wanted, abs=0.03)  # four standard errors of 4,000 draws


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.array([2.0, -1.0, 0.5, 3.0], dtype=np.float32)
    reference = RepetitionPenaltyLogitsProcessor(penalty=1.7)(torch.tensor([[1, 3]]), torch.tensor(logits)[None])
    sampler = Sampler(Sampling(repetition_penalty=1.7), [1, 3])
    assert sampler.take(logits) == int(reference.argmax())
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0]  # the caller's are untouched
    assert sampler.take(logits) == int(
        RepetitionPenaltyLogitsProcessor(penalty=1.7)(torch.tensor([[0, 1, 3]]), torch.tensor(logits)[None]).argmax()
    )


def reference(logits: np.ndarray, output: list[int], presence: float, frequency: float, bias: dict[int, float]) -> Any:
    """The formula of the OpenAI API: mu[j] - c[j] * frequency - float(c[j] > 0) * presence, and the bias added."""
    adjusted = logits.astype(np.float64)
    for token in range(len(logits)):
        count = output.count(token)
        adjusted[token] += -count * frequency - float(count > 0) * presence + bias.get(token, 0.0)
    return adjusted


@pytest.mark.parametrize("presence", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("frequency", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("bias", [{}, {2: 1.5, 0: -100.0}])
def test_penalties_and_biases_are_those_of_openai(presence: float, frequency: float, bias: dict[int, float]) -> None:
    settings = Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    sampler, output = Sampler(settings, [1, 1, 1]), list[int]()  # the prompt does not count
    kept = LOGITS.copy()
    for _ in range(30):
        wanted = reference(LOGITS, output, presence, frequency, bias)
        token = sampler.take(LOGITS)
        assert wanted[token] == pytest.approx(wanted.max(), abs=1e-5)
        output.append(token)
    assert (kept == LOGITS).all()


def test_penalties_and_biases_shape_the_draws() -> None:
    found = drawn(Sampling(1.0, logit_bias={0: 2.0, 1: -100.0}))
    wanted = np.array([0.05 * np.exp(2), 0, 0.1, 0.25, 0.2])
    assert found == pytest.approx(wanted / wanted.sum(), abs=0.03)
    first = [Sampler(Sampling(1.0, seed=seed, presence_penalty=2.0), []) for seed in range(4000)]
    pairs = [(sampler.take(LOGITS), sampler.take(LOGITS)) for sampler in first]
    repeated = sum(a == b for a, b in pairs) / len(pairs)
    shares, low = np.exp(LOGITS), np.exp(-2.0)
    assert repeated == pytest.approx(sum(p * p * low / (1 - p + p * low) for p in shares), abs=0.03)


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        Sampler(Sampling(logit_bias={len(LOGITS): 1.0}), []).take(LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    allowed = np.array([True, False, True, False, False])
    settings = [Sampling(temperature, seed=seed, logit_bias={1: 100.0}, top_k=3, top_p=0.9) for seed in range(200)]
    taken = {Sampler(each, []).take(LOGITS, allowed) for each in settings}
    assert taken == ({2} if temperature == 0 else {0, 2})
    assert Sampler(Sampling(temperature, min_p=0.9), []).take(LOGITS, allowed) == 2


def test_a_seed_gives_the_same_tokens_and_none_gives_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), [])
        return [sampler.take(LOGITS) for _ in range(64)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"min_p": -1.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).split("_")[0]):
        Sampling(**wrong)


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary(spread: float, top_p: float) -> None:
    """As sorting all of it would have it."""
    weights = np.exp(np.random.default_rng(0).normal(0, spread, 20_000))
    order = np.argsort(-weights, kind="stable")
    mass = np.cumsum(weights[order]) / weights.sum()
    wanted = order[: int(np.argmax(mass >= top_p)) + 1]
    assert module._nucleus(weights, top_p).tolist() == wanted.tolist()
