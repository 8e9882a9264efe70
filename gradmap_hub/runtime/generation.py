"""One model, and answers in the making."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime.artifacts import Artifact
from gradmap_hub.runtime.pool import Row, RowPool
from gradmap_hub.runtime.prompting import ModelError, TextCodec
from gradmap_hub.runtime.sampling import Sampler, Sampling
from gradmap_hub.runtime.stopping import StopText

if TYPE_CHECKING:  # importing it needs ONNX Runtime, which `load` asks for in words
    from gradmap_hub.runtime.session import Session, Steps

# Prompt tokens read in one step: bounds the logits in memory (tokens x vocabulary) and how long others wait.
PREFILL_TOKENS = 256

FinishReason = Literal["stop", "length", "cancelled"]


class PromptError(GradmapError):
    """A prompt that this model cannot take. `tokens` and `limit`, if it is too long."""

    def __init__(self, message: str, *, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class TextModel:
    """A loaded model: text in, `Generation` out. Loading it costs; a generation only its cache."""

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        session: Session,
        codec: TextCodec,
        context_length: int,
        vocabulary: int,
        threads: int,
    ) -> None:
        self.name = name
        self.artifact = artifact.path
        self.provider = session.provider
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.threads = threads
        self._session = session
        self._codec = codec

    @property
    def has_chat_template(self) -> bool:
        return self._codec.chat_template is not None

    @property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        return self._codec.ends

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds by itself.

        Raises:
            PromptError: nothing is left of it.
        """
        return self._encoded(lambda: self._codec.encode_text(text))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of messages ({"role", "content"}) in the model's chat template, run in a sandbox.

        Raises:
            PromptError: the model has no template, or it refuses these messages.
        """
        return self._encoded(lambda: self._codec.encode_chat(messages))

    def _encoded(self, encode: Any) -> list[int]:
        try:
            return encode()
        except ModelError as error:
            raise PromptError(str(error)) from error
        except (UnicodeError, OverflowError) as error:
            raise PromptError(f"This text cannot be encoded: {error}") from error

    def start(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        room: Callable[[int], Steps] | None = None,
    ) -> Generation:
        """Begin an answer of at most `max_tokens` tokens, fewer where the context ends; nothing is computed yet.

        `ignore_end`: go on behind the end of the text, for measurements; `room`: gives an empty cache for so many
        tokens, default one of its own.

        Raises:
            PromptError: the prompt leaves no room in the context, is empty, or holds what is no token id.
        """
        count = len(prompt_ids)
        if not count or max_tokens < 1:
            raise PromptError("There is nothing to do: no prompt, or no token to write.")
        strange = next((token for token in prompt_ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise PromptError(f"{strange} is no token id of this model: they go from 0 to {self.vocabulary - 1}.")
        if count >= self.context_length:
            raise PromptError(
                f"The prompt is {count} tokens long; with room for an answer at most {self.context_length - 1} fit.",
                tokens=count,
                limit=self.context_length - 1,
            )
        limit = min(max_tokens, self.context_length - count)
        sampler = Sampler(sampling or Sampling(), list(prompt_ids))
        ends = frozenset() if ignore_end else self.end_ids
        # Neither the last token written nor the end needs a place in the cache, but a full one is simpler to reason of.
        steps = (room or self._session.start)(count + limit)
        return Generation(steps, self._codec, list(prompt_ids), limit, sampler, stop, ends)

    def batch(self, rows: int) -> Batch:
        """For up to `rows` answers at a time that take their steps together."""
        return Batch(self, self._session, rows)

    def losses(self, token_ids: Sequence[int]) -> np.ndarray:
        """Negative log-likelihood in nats of each token but the first, given those before it: (tokens - 1,) float64.

        Raises:
            PromptError: fewer than two tokens, or more than the context holds.
        """
        count = len(token_ids)
        if not 2 <= count <= self.context_length:
            raise PromptError(f"Between 2 and {self.context_length} tokens can be measured, these are {count}.")
        steps = self._session.start(count)
        found: list[np.ndarray] = []
        for start in range(0, count, PREFILL_TOKENS):
            part = list(token_ids[start : start + PREFILL_TOKENS])
            wanted = np.asarray(token_ids[start + 1 : start + 1 + PREFILL_TOKENS], dtype=np.int64)
            found.append(negative_log_likelihoods(steps.run(part)[: len(wanted)], wanted))
        return np.concatenate(found)

    def warm_up(self) -> None:
        """One step nobody sees: the first run of a session also allocates."""
        answer = self.start([min(self.end_ids, default=0)], max_tokens=1)
        answer.advance()
        answer.close()


def negative_log_likelihoods(logits: np.ndarray, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Nats of each token under the logits (tokens, vocabulary) before it: (tokens,) float64."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=1)
    normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return normaliser - logits[np.arange(len(logits)), np.asarray(token_ids)]


class Generation:
    """An answer in the making. Iterate over it for its text, or call `advance` yourself.

    Not thread safe; the generations of one model must be advanced by one thread at a time.
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
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.first_token_seconds: float | None = None
        self._steps: Steps | None = steps
        self._ends = ends
        self._next_piece = codec.stream()
        self._prompt = prompt_ids
        self._read = 0
        self._limit = limit
        self._sampler = sampler
        self._stop = StopText(stop)
        # Seconds of the steps alone: while others have their turn, this one's clock stands.
        self._prompt_seconds = self._token_seconds = 0.0

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, in this generation's own steps."""
        count = len(self.token_ids) - 1
        return count / self._token_seconds if count > 0 and self._token_seconds > 0 else None

    @property
    def row(self) -> Row | None:
        """Its place in the pool of a `Batch`, while it has one."""
        return self._steps if isinstance(self._steps, Row) else None

    @property
    def reading(self) -> bool:
        """Whether a part of the prompt is still to be read."""
        return self._read < len(self._prompt)

    def advance(self) -> str:
        """One step: a part of the prompt, or one token. Returns the text that became final, which may be none."""
        if self._steps is None:
            return ""
        began = time.perf_counter()
        if self.reading:
            part = self._prompt[self._read : self._read + PREFILL_TOKENS]
            logits = self._steps.run(part)
            self._read += len(part)
            if self.reading:
                self._prompt_seconds += time.perf_counter() - began
                return ""
        else:
            logits = self._steps.run(self.token_ids[-1:])
        return self.take(logits[-1], began)

    def take(self, logits: np.ndarray, began: float) -> str:
        """The next token, chosen by its logits (vocabulary,), which took since `began` (perf_counter)."""
        token = self._sampler.take(logits.astype(np.float32))
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
        final = self._stop.add(self._next_piece(token))
        self.text += final
        if self._stop.met:
            return final + self._finish("stop")
        if len(self.token_ids) >= self._limit:
            return final + self._finish("length")
        return final

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        final = self._stop.rest()
        self.text += final
        self.close()
        return final

    def cancel(self) -> None:
        """End it where it stands."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
        self.close()

    def close(self) -> None:
        """Give the cache back; the text stays."""
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def __iter__(self) -> Iterator[str]:
        """The text, piece by piece, until the end."""
        try:
            while self.finish_reason is None:
                piece = self.advance()
                if piece:
                    yield piece
        finally:
            self.cancel()


class Batch:
    """Answers of one model that take their steps together, as far as the graph allows it: see pool.py. Each gets the
    tokens that it would get alone.

    Not thread safe.
    """

    def __init__(self, model: TextModel, session: Session, rows: int) -> None:
        self._model = model
        self._pool = RowPool(session, rows, model.context_length) if session.batches else None

    def start(self, prompt_ids: Sequence[int], **options: Any) -> Generation:
        """As `TextModel.start`, with its options. Raises IndexError if all rows are taken."""
        pool = self._pool
        return self._model.start(prompt_ids, room=None if pool is None else lambda _: pool.take(), **options)

    def step(self, answers: Sequence[Generation]) -> list[str | Exception]:
        """One step of each, see `Generation.advance`: those that read their prompt one after the other, those that
        write in one run. What goes wrong is in the place of the text, and ends no other."""
        found: dict[Generation, str | Exception] = {}
        writing = [(answer, answer.row) for answer in answers if not answer.reading]
        together = [(answer, row) for answer, row in writing if row is not None]
        if self._pool is not None and len(together) > 1:
            began = time.perf_counter()
            tokens = [answer.token_ids[-1] for answer, _ in together]
            try:
                logits = self._pool.write([row for _, row in together], tokens)
            except GradmapError:
                pass  # each alone, below: only the one that cannot will say so
            else:
                for (answer, _), own in zip(together, logits, strict=True):
                    found[answer] = _tried(lambda answer=answer, own=own: answer.take(own, began))
        return [found[answer] if answer in found else _tried(answer.advance) for answer in answers]


def _tried(action: Callable[[], str]) -> str | Exception:
    try:
        return action()
    except Exception as error:
        return error
