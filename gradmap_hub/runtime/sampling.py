"""The next token, from the logits of one position."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gradmap_hub.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken; the filters apply in this order, as in transformers' `generate`.

    `repetition_penalty` (1 = none) divides positive and multiplies negative logits of tokens that are already there,
    the prompt's included; `temperature` 0 takes the likeliest token; `top_k` (0 = all), `top_p` and `min_p` (a share of
    the likeliest token's probability, 0 = none) bound the choice. `seed`: None draws one.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_k < 0:
            raise UsageError(f"top_k must not be negative, it is {self.top_k}.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"seed lies between 0 and 2**64 - 1, it is {self.seed}.")


# The first number of tokens that top_p looks among.
_NUCLEUS = 128


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} lies between {low:g} and {high:g}, it is {value:g}.")


@dataclass
class Sampler:
    """Takes token after token; holds what depends on the tokens before."""

    sampling: Sampling
    prompt_ids: Sequence[int]
    _seen: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = set(self.prompt_ids)
        seed = self.sampling.seed
        self._random = np.random.default_rng(secrets.randbits(64) if seed is None else seed)

    def take(self, logits: np.ndarray) -> int:
        """The next token id. `logits`: (vocabulary,) float32; not changed."""
        settings = self.sampling
        if settings.repetition_penalty != 1.0 and self._seen:
            logits = logits.copy()
            seen = np.fromiter((token for token in self._seen if token < len(logits)), dtype=np.int64)
            known = logits[seen]
            penalty = settings.repetition_penalty
            logits[seen] = np.where(known > 0, known / penalty, known * penalty)
        token = int(logits.argmax()) if settings.temperature == 0 else self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        settings = self.sampling
        candidates = np.arange(len(logits))
        if 0 < settings.top_k < len(logits):
            # By id, so that a seed gives the same answer on every machine.
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
    """The places of the largest weights that make up `top_p` of all, largest first, equal ones in order. The one that
    crosses `top_p` belongs to them, so at least one always does."""
    count, wanted = len(weights), top_p * weights.sum()
    tried = min(_NUCLEUS, count)
    while True:  # a few hold most of the mass, and sorting a whole vocabulary is slow
        top = np.arange(count) if tried == count else np.argpartition(weights, count - tried)[count - tried :]
        top = top[np.lexsort((top, -weights[top]))]
        mass = np.cumsum(weights[top])
        if mass[-1] >= wanted or tried == count:
            return top[: int(np.searchsorted(mass, wanted)) + 1]
        tried = min(8 * tried, count)
