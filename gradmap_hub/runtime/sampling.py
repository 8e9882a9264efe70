"""Samples the next token from the logits of one position."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradmap_hub.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, applied in the order below, as in transformers' `generate` and the OpenAI API.

    - `repetition_penalty` (0.01 to 100; 1: off) divides the positive and multiplies the negative logits of tokens in
      the prompt and the output so far.
    - From the logit of each token in the output, `frequency_penalty` times the number of its occurrences is subtracted,
      and `presence_penalty` once (both -2 to 2; 0: off).
    - `logit_bias` (token id to a number from -100 to 100) is added to the logits.
    - `temperature` (0 to 100) divides the logits; 0 is greedy decoding (top-1).
    - `top_k` (0: off), `top_p` (0 to 1; 1: off) and `min_p` (a share of the top-1 probability, 0 to 1; 0: off) limit
      the candidates.

    `seed` (0 to 2**64 - 1) makes the output reproducible; None draws a random one.

    Raises:
        UsageError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise UsageError(f"logit_bias must have token ids of at least 0; got {token}.")
            _within("logit_bias", bias, -100.0, 100.0)
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0; got {self.top_k}.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be between 0 and 2**64 - 1; got {self.seed}.")


# Most probable tokens that top_p sorts at first; more only if their probability is too small.
_NUCLEUS = 128


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} must be between {low:g} and {high:g}; got {value:g}.")


@dataclass
class Sampler:
    """Samples the tokens of one generation; keeps the random state and the tokens so far, for the penalties."""

    sampling: Sampling
    prompt_ids: Sequence[int]
    _seen: set[int] = field(init=False)
    _counts: dict[int, int] = field(init=False, default_factory=dict)  # of the output alone

    def __post_init__(self) -> None:
        self._seen = set(self.prompt_ids)
        settings = self.sampling
        self._penalises = settings.presence_penalty != 0 or settings.frequency_penalty != 0
        self._adjusts = self._penalises or settings.repetition_penalty != 1.0 or bool(settings.logit_bias)
        self._biased = np.fromiter(settings.logit_bias.keys(), dtype=np.int64)
        self._biases = np.fromiter(settings.logit_bias.values(), dtype=np.float32)
        seed = settings.seed
        self._random = np.random.default_rng(secrets.randbits(64) if seed is None else seed)

    def take(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """Return the next token id. `logits`: (vocabulary,) float32, not modified; `allowed`: (vocabulary,) bool, the
        tokens to choose from, whatever penalties and biases say; None: all.

        Raises:
            UsageError: `logit_bias` has a token id beyond the vocabulary.
        """
        if self._adjusts:
            logits = self._adjusted(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, -np.inf)
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._draw(logits)
        self._seen.add(token)
        if self._penalises:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return a copy of the logits with penalties and biases."""
        settings = self.sampling
        logits = logits.copy()
        if settings.repetition_penalty != 1.0:
            seen = np.fromiter((token for token in self._seen if token < len(logits)), dtype=np.int64)
            known = logits[seen]
            penalty = settings.repetition_penalty
            logits[seen] = np.where(known > 0, known / penalty, known * penalty)
        if self._counts:
            ids = np.fromiter(self._counts.keys(), dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            logits[ids] -= counts * settings.frequency_penalty + settings.presence_penalty
        if len(self._biased):
            if self._biased.max() >= len(logits):
                raise UsageError(f"logit_bias has a token id beyond the vocabulary: {self._biased.max()}.")
            logits[self._biased] += self._biases
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        settings = self.sampling
        candidates = np.arange(len(logits))
        if 0 < settings.top_k < len(logits):
            # Sorted by id, so that a seed gives the same tokens on every machine.
            candidates = np.sort(np.argpartition(logits, -settings.top_k)[-settings.top_k :])
        scaled = logits[candidates].astype(np.float64) / settings.temperature
        weights = np.exp(scaled - scaled.max())
        if settings.top_p < 1.0:
            kept = _nucleus(weights, settings.top_p)
            candidates, weights = candidates[kept], weights[kept]
        if settings.min_p > 0.0:
            likely = weights >= settings.min_p * weights.max()
            candidates, weights = candidates[likely], weights[likely]
        mass = np.cumsum(weights)
        place = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        return int(candidates[min(place, len(mass) - 1)])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices of the largest weights that sum to `top_p` of the total, largest first, ties by index.

    The weight that crosses `top_p` is included, so the result is never empty.
    """
    count, wanted = len(weights), top_p * weights.sum()
    tried = min(_NUCLEUS, count)
    while True:  # a few tokens hold most of the mass, and sorting the whole vocabulary is slow
        top = np.arange(count) if tried == count else np.argpartition(weights, count - tried)[count - tried :]
        top = top[np.lexsort((top, -weights[top]))]
        mass = np.cumsum(weights[top])
        if mass[-1] >= wanted or tried == count:
            return top[: int(np.searchsorted(mass, wanted)) + 1]
        tried = min(8 * tried, count)
