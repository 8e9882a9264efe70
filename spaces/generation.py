"""Token-by-token generation, and the interface that both engines implement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Literal, Protocol

import numpy as np
from prompting import ModelError, TextCodec

FinishReason = Literal["stop", "length", "stopped"]


@dataclass(frozen=True)
class Settings:
    """Sampling settings. A temperature of 0 always picks the top-1 token."""

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Decoder(Protocol):
    """A model with the KV cache of one answer."""

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append the tokens and return the logits of the next token: float32, shape (vocabulary,)."""
        ...


class Model(Protocol):
    """A loaded model."""

    text: TextCodec
    context_length: int | None

    def start(self) -> Decoder: ...


def choose(logits: np.ndarray, settings: Settings, random: np.random.Generator) -> int:
    """Pick the next token: top-1, or sampled from the smallest set with a probability mass of top_p."""
    if settings.temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / settings.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    running = np.cumsum(weights[order])
    # The token that crosses top_p is included, so the set is never empty.
    kept = order[: int(np.searchsorted(running, settings.top_p)) + 1]
    return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))


@dataclass
class Generation:
    """A running generation. Each `advance` adds at most one token and records its time.

    When finished it drops model and cache, because pages keep it until the vote.

    Raises:
        ModelError: the prompt does not fit into the context.
    """

    model: InitVar[Model]
    prompt_ids: list[int]
    settings: Settings
    token_ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def __post_init__(self, model: Model) -> None:
        self._limit = self.settings.max_new_tokens
        if model.context_length is not None:
            room = model.context_length - len(self.prompt_ids)
            if room < 1:
                raise ModelError(
                    f"The prompt is {len(self.prompt_ids)} tokens long; the model's limit is {model.context_length}."
                )
            self._limit = min(self._limit, room)
        self._decoder: Decoder | None = model.start()
        self._random = np.random.default_rng(self.settings.seed)
        self._next_piece: Callable[[int], str] = model.text.stream()
        self._ends = model.text.ends

    def advance(self) -> None:
        if self.finish_reason is not None or self._decoder is None:
            return
        began = time.perf_counter()
        logits = self._decoder.step(self.token_ids[-1:] or self.prompt_ids)
        token = choose(logits, self.settings, self._random)
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token)
            self.text += self._next_piece(token)
            if len(self.token_ids) >= self._limit:
                self.finish_reason = "length"
        # The step that produces the end token is timed like the others.
        self.seconds.append(time.perf_counter() - began)
        if self.finish_reason is not None:
            self._decoder = None

    def stop(self) -> None:
        if self.finish_reason is None:
            self.finish_reason = "stopped"
            self._decoder = None

    @property
    def first_token_seconds(self) -> float | None:
        """The time of the first step, which includes prefill."""
        return self.seconds[0] if self.seconds else None

    @property
    def seconds_per_token(self) -> float | None:
        later = self.seconds[1:]
        return sum(later) / len(later) if later else None


def begin(model: Model, prompt: str, settings: Settings) -> Generation:
    return Generation(model, model.text.encode(prompt), settings)


def warm_up(model: Model) -> None:
    """Run two hidden steps: the first run of a session also allocates memory, which would be timed."""
    generation = begin(model, "Hello", Settings(max_new_tokens=2))
    while generation.finish_reason is None:
        generation.advance()
