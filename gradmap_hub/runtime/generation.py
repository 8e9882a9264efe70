"""A running generation: the steps of one text, from its prompt to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradmap_hub.runtime.constraints import Constraint
from gradmap_hub.runtime.prefixes import KeysValues
from gradmap_hub.runtime.prompting import TextCodec
from gradmap_hub.runtime.sampling import Sampler
from gradmap_hub.runtime.scores import Scoring, TokenScore, negative_log_likelihoods, score, scores
from gradmap_hub.runtime.stopping import StopText

if TYPE_CHECKING:  # importing it needs ONNX Runtime; `load` reports when it is missing
    from gradmap_hub.runtime.session import Steps

# Prompt tokens per prefill step. Bounds the logits in memory (tokens x vocabulary) and the wait of other generations.
PREFILL_TOKENS = 256

FinishReason = Literal["stop", "length", "cancelled"]


def losses_of(steps: Steps, token_ids: Sequence[int]) -> np.ndarray:
    """Return the negative log-likelihood in nats of all tokens but the first: (tokens - 1,) float64.

    `steps`: with an empty KV cache, which the tokens fill.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(token_ids), PREFILL_TOKENS):
        part = list(token_ids[start : start + PREFILL_TOKENS])
        wanted = np.asarray(token_ids[start + 1 : start + 1 + PREFILL_TOKENS], dtype=np.int64)
        found.append(negative_log_likelihoods(steps.run(part)[: len(wanted)], wanted))
    return np.concatenate(found)


class Generation:
    """A running generation, made by `TextModel.start`. Iterate over it for its text, or call `advance` yourself.

    `text`: the final text so far; `token_ids`: the output so far, without an end token; `finish_reason`: None until the
    end, then "stop" (end token, stop string or complete constraint), "length" or "cancelled"; `first_token_seconds`:
    time spent in steps of this generation until its first token; `cached_tokens`: prompt tokens whose keys and values
    were reused from another text.

    Not thread-safe: only one thread at a time may advance the generations of a model.
    """

    def __init__(
        self,
        steps: Steps,
        codec: TextCodec,
        prompt_ids: list[int],
        limit: int,
        sampler: Sampler,
        stop: Sequence[str],
        ends: frozenset[int],
        *,
        scoring: Scoring | None = None,
        echo: str = "",
        min_tokens: int = 0,
        constraint: Constraint | None = None,
        keep: Callable[[np.ndarray, Steps], None] | None = None,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.first_token_seconds: float | None = None
        self._steps: Steps | None = steps
        self._ends = ends
        self._next_piece = codec.stream()
        self._prompt = prompt_ids
        self._prompt_array = np.array(prompt_ids, dtype=np.int64)
        self._read = 0
        # Prompt tokens whose keys and values came from another text.
        self.cached_tokens = 0
        self._keep = keep
        self._shown = shown or {}
        self._limit = limit
        self._sampler = sampler
        self._stop = StopText(stop)
        self._scoring = scoring
        self._echo = echo
        self._min_tokens = min_tokens
        self._constraint = constraint
        self._scored: list[TokenScore] = []
        # Of tokens whose text is not final yet.
        self._unreleased: list[TokenScore] = []
        # Seconds spent in steps of this generation; steps of other generations do not count.
        self._prompt_seconds = self._token_seconds = 0.0

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first, per second of this generation's steps; None before the second token."""
        count = len(self.token_ids) - 1
        return count / self._token_seconds if count > 0 and self._token_seconds > 0 else None

    @property
    def steps(self) -> Steps | None:
        """The model with the KV cache of this text; None after the end."""
        return self._steps

    @property
    def unread(self) -> int:
        """How many tokens of the prompt have no keys and values yet."""
        return len(self._prompt) - self._read

    @property
    def reading(self) -> bool:
        """Whether the prefill is incomplete."""
        return self._read < len(self._prompt)

    @property
    def resumable(self) -> bool:
        """Whether the prefill may reuse the keys and values of another text: not if the prompt has to be scored."""
        scores_prompt = self._scoring is not None and self._scoring.prompt
        return self._steps is not None and not self._read and not scores_prompt

    @property
    def prompt(self) -> np.ndarray:
        """The token ids of the prompt: (tokens,) int64."""
        return self._prompt_array

    @property
    def read(self) -> int:
        """How many tokens of the prompt have keys and values."""
        return self._read

    def resume(self, parts: Sequence[KeysValues]) -> None:
        """Begin the prefill after the keys and values of the first tokens; at least two tokens must remain."""
        assert self._steps is not None
        self._steps.fill(parts)
        self._read = self.cached_tokens = self._steps.length

    def advance(self, most: int = PREFILL_TOKENS) -> str:
        """Run one step (at most `most` tokens of the prompt, or one token of the output); return the text that became
        final, which may be empty."""
        if self._steps is None:
            return ""
        began = time.perf_counter()
        if self.reading:
            count = min(most, PREFILL_TOKENS)
            # Never a single token at the end: int8 kernels for one token round differently from those for several, and
            # an answer must not depend on how its prompt was divided.
            if self.unread == count + 1:
                count += 1 if count < 3 else -1
            part = self._prompt[self._read : self._read + count]
            logits = self._steps.run(part)
            if self._scoring is not None and self._scoring.prompt:
                self._score_prompt(logits, self._scoring.top)
            self._read += len(part)
            if self.reading:
                self._prompt_seconds += time.perf_counter() - began
                return ""
            self._release()
            self.text = self._echo
            if not self._limit:
                return self._echo + self._finish("length")
            return self._echo + self.take(logits[-1], began)
        else:
            logits = self._steps.run(self.token_ids[-1:])
        return self.take(logits[-1], began)

    def _score_prompt(self, logits: np.ndarray, top: int) -> None:
        """Score the prompt tokens that follow those of a prefill step, given its logits (tokens, vocabulary)."""
        if not self._read:
            self._unreleased.append(TokenScore(self._prompt[0], None))
        following = self._prompt[self._read + 1 : self._read + 1 + len(logits)]
        self._unreleased += scores(logits[: len(following)], following, top)

    def take_scores(self) -> list[TokenScore]:
        """Return the scores of the tokens whose text became final since the last call.

        The scores of the prompt are returned all at once. An end token has a score; tokens of a stop string have none,
        because their text is not part of the answer.
        """
        taken, self._scored = self._scored, []
        return taken

    def take(self, logits: np.ndarray, began: float) -> str:
        """Sample a token from logits (vocabulary,) and return the text that became final.

        `began`: when the step that computed the logits began (perf_counter seconds).
        """
        values = logits.astype(np.float32)  # a copy
        if len(self.token_ids) < self._min_tokens:
            values[[token for token in self._ends if token < len(values)]] = -np.inf
        if self._constraint is None:
            token = self._sampler.take(values)
        else:
            token = self._sampler.take(values, self._constraint.allowed(len(values)))
            self._constraint.accept(token)
        if self._scoring is not None:
            self._unreleased.append(score(logits, token, self._scoring.top))
        seconds = time.perf_counter() - began
        if self.first_token_seconds is None:
            self.first_token_seconds = self._prompt_seconds + seconds
        else:
            self._token_seconds += seconds
        return self._write(token)

    def _write(self, token: int) -> str:
        if token in self._ends:
            return self._finish("stop")
        self.token_ids.append(token)
        piece = self._next_piece(token) + self._shown.get(token, "")
        final = piece if len(self.token_ids) <= self._min_tokens else self._stop.add(piece)
        self.text += final
        if final:
            self._release()
        if self._stop.met:
            self._unreleased.clear()
            return final + self._finish("stop")
        if self._constraint is not None and self._constraint.finished:
            return final + self._finish("stop")
        if len(self.token_ids) >= self._limit:
            return final + self._finish("length")
        return final

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        final = self._stop.rest()
        self.text += final
        self._release()
        self.close()
        return final

    def _release(self) -> None:
        self._scored += self._unreleased
        self._unreleased.clear()

    def cancel(self) -> None:
        """Stop the generation; the text so far stays."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
        self.close()

    def close(self) -> None:
        """Free the KV cache; the text stays."""
        steps, self._steps = self._steps, None
        if steps is not None:
            try:
                # Only what a prefill computed: decode steps round differently, see `advance`.
                if self._keep is not None:
                    self._keep(self._prompt_array[: self._read], steps)
            finally:
                steps.close()

    def __iter__(self) -> Iterator[str]:
        """Yield the text in pieces until the end; leaving the loop early cancels the generation."""
        try:
            while self.finish_reason is None:
                piece = self.advance()
                if piece:
                    yield piece
        finally:
            self.cancel()
