"""A loaded text model and its running generations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime.artifacts import Artifact
from gradmap_hub.runtime.constraints import Constraint, JsonConstraints
from gradmap_hub.runtime.continuing import cut_after
from gradmap_hub.runtime.pool import Row, RowPool
from gradmap_hub.runtime.prompting import ModelError, TextCodec
from gradmap_hub.runtime.sampling import Sampler, Sampling
from gradmap_hub.runtime.scores import Scoring, TokenScore, negative_log_likelihoods, score, scores
from gradmap_hub.runtime.stopping import StopText
from gradmap_hub.runtime.token_text import TokenBytes

if TYPE_CHECKING:  # importing it needs ONNX Runtime; `load` reports when it is missing
    from gradmap_hub.runtime.session import Session, Steps

# Prompt tokens per prefill step. Bounds the logits in memory (tokens x vocabulary) and the wait of other generations.
PREFILL_TOKENS = 256

FinishReason = Literal["stop", "length", "cancelled"]


class PromptError(GradmapError):
    """The model cannot use this prompt. `tokens` and `limit` are set if it is too long."""

    def __init__(self, message: str, *, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class TextModel:
    """A loaded model: text in, `Generation` out. The weights are loaded once; a generation adds only its KV cache."""

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
    def chat_template(self) -> str | None:
        return self._codec.chat_template

    @property
    def has_chat_template(self) -> bool:
        return self._codec.chat_template is not None

    @property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        return self._codec.ends

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of plain text; `special`: including the special tokens that the tokenizer adds.

        Raises:
            PromptError: the text has no tokens or cannot be encoded.
        """
        return self._encoded(lambda: self._codec.encode_text(text, special=special))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the token ids of messages ({"role", "content"}), rendered by the model's chat template in a sandbox.

        `add_generation_prompt`: end with the start of an answer; `continue_final_message`: end within the last message
        instead, so that the answer continues it.

        Raises:
            PromptError: the model has no chat template, or the template rejects these messages.
        """

        def encode() -> list[int]:
            begin = add_generation_prompt and not continue_final_message
            text = self._codec.rendered(messages, add_generation_prompt=begin)
            if continue_final_message:
                text = cut_after(text, messages[-1]["content"])
            return self._codec.encode_rendered(text)

        return self._encoded(encode)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._codec.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, which need not be valid UTF-8."""
        return self._token_bytes(token)

    def is_special(self, token: int) -> bool:
        """Whether the text of an answer leaves this token out."""
        return token in self._token_bytes.special

    def constrain(self, schema: Mapping[str, Any]) -> Constraint:
        """Return a constraint of one answer to a JSON schema; the first call takes up to a second.

        Raises:
            MissingExtra: llguidance is not installed.
            ConstraintError: the schema or the tokenizer cannot be used.
        """
        return self._json_constraints.of(schema)

    @cached_property
    def _json_constraints(self) -> JsonConstraints:
        return JsonConstraints(self._codec.tokenizer, self.vocabulary, self.end_ids)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._codec.tokenizer)

    def _encoded(self, encode: Any) -> list[int]:
        try:
            return encode()
        except ModelError as error:
            raise PromptError(str(error)) from error
        except (UnicodeError, OverflowError) as error:
            raise PromptError(f"The text cannot be encoded: {error}") from error

    def start(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        min_tokens: int = 0,
        scoring: Scoring | None = None,
        echo: str = "",
        constraint: Constraint | None = None,
        room: Callable[[int], Steps] | None = None,
    ) -> Generation:
        """Create a generation of at most `max_tokens` tokens, fewer if the context ends first. Computes nothing yet.

        `max_tokens` 0 only reads the prompt, to score it; `ignore_end`: do not stop at end tokens, for benchmarks;
        `min_tokens`: before that many, neither an end token nor a stop string ends the answer; `scoring`: what
        `take_scores` returns; `echo`: text that the answer begins with; `constraint`: which tokens the answer
        may have; `room`: returns an empty KV cache for a number of tokens, default: a cache of its own.

        Raises:
            PromptError: the prompt is empty, leaves no room in the context, or contains an invalid token id; or
                `max_tokens` < 0.
        """
        count = len(prompt_ids)
        if not count or max_tokens < 0:
            raise PromptError("There is nothing to generate: give a prompt and a number of tokens.")
        strange = next((token for token in prompt_ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise PromptError(f"{strange} is not a token id of this model; valid ids are 0 to {self.vocabulary - 1}.")
        longest = self.context_length - min(1, max_tokens)
        if count > longest:
            raise PromptError(
                f"The prompt is {count} tokens long; shorten it to {longest} tokens or fewer.",
                tokens=count,
                limit=longest,
            )
        limit = min(max_tokens, self.context_length - count)
        sampler = Sampler(sampling or Sampling(), list(prompt_ids))
        ends = frozenset() if ignore_end else self.end_ids
        # The last token generated needs no place in the cache, but a cache for all tokens is simpler to reason about.
        steps = (room or self._session.start)(count + limit)
        return Generation(
            steps, self._codec, list(prompt_ids), limit, sampler, stop, ends, scoring=scoring, echo=echo,
            min_tokens=min_tokens, constraint=constraint,
        )  # fmt: skip

    def batch(self, rows: int) -> Batch:
        """Return a batch that decodes up to `rows` generations together."""
        return Batch(self, self._session, rows)

    def losses(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the negative log-likelihood in nats of all tokens but the first: (tokens - 1,) float64.

        Raises:
            PromptError: fewer than two tokens, or more than the context holds.
        """
        count = len(token_ids)
        if not 2 <= count <= self.context_length:
            raise PromptError(f"Losses need 2 to {self.context_length} tokens; got {count}.")
        steps = self._session.start(count)
        found: list[np.ndarray] = []
        for start in range(0, count, PREFILL_TOKENS):
            part = list(token_ids[start : start + PREFILL_TOKENS])
            wanted = np.asarray(token_ids[start + 1 : start + 1 + PREFILL_TOKENS], dtype=np.int64)
            found.append(negative_log_likelihoods(steps.run(part)[: len(wanted)], wanted))
        return np.concatenate(found)

    def warm_up(self) -> None:
        """Run one step and discard it: the first run of a session also allocates memory."""
        answer = self.start([min(self.end_ids, default=0)], max_tokens=1)
        answer.advance()
        answer.close()


class Generation:
    """A running generation. Iterate over it for its text, or call `advance` yourself.

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
    def row(self) -> Row | None:
        """The row of a `Batch` pool that holds the KV cache; None if it has its own."""
        return self._steps if isinstance(self._steps, Row) else None

    @property
    def reading(self) -> bool:
        """Whether the prefill is incomplete."""
        return self._read < len(self._prompt)

    def advance(self) -> str:
        """Run one step (a part of the prompt, or one token) and return the text that became final; may be empty."""
        if self._steps is None:
            return ""
        began = time.perf_counter()
        if self.reading:
            part = self._prompt[self._read : self._read + PREFILL_TOKENS]
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
        """Score the tokens of the prompt that follow the ones of a step, given its logits (tokens, vocabulary)."""
        if not self._read:
            self._unreleased.append(TokenScore(self._prompt[0], None))
        following = self._prompt[self._read + 1 : self._read + 1 + len(logits)]
        self._unreleased += scores(logits[: len(following)], following, top)

    def take_scores(self) -> list[TokenScore]:
        """Return the scores of the tokens whose text became final since the last call: those of the prompt all at once,
        an end token's too, none of a stop string's, as its text is not part of the answer.
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
        piece = self._next_piece(token)
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


class Batch:
    """Generations of one model, decoded together if the graph supports it (see pool.py).

    Each yields the same tokens as on its own. Not thread-safe.
    """

    def __init__(self, model: TextModel, session: Session, rows: int) -> None:
        self._model = model
        self._pool = RowPool(session, rows, model.context_length) if session.batches else None

    def start(self, prompt_ids: Sequence[int], **options: Any) -> Generation:
        """Create a generation in this batch; options as in `TextModel.start`.

        Raises:
            IndexError: all rows are in use.
            PromptError: as in `TextModel.start`.
        """
        pool = self._pool
        return self._model.start(prompt_ids, room=None if pool is None else lambda _: pool.take(), **options)

    def step(self, answers: Sequence[Generation]) -> list[str | Exception]:
        """Run one step of each generation: prefill steps one by one, decode steps in one run of the graph.

        Returns for each the text that became final, or the exception it raised; an exception affects no other.
        """
        found: dict[Generation, str | Exception] = {}
        writing = [(answer, answer.row) for answer in answers if not answer.reading]
        together = [(answer, row) for answer, row in writing if row is not None]
        if self._pool is not None and len(together) > 1:
            began = time.perf_counter()
            tokens = [answer.token_ids[-1] for answer, _ in together]
            try:
                logits = self._pool.write([row for _, row in together], tokens)
            except GradmapError:
                pass  # retried one by one below, so that only the failing generation reports the error
            else:
                for (answer, _), own in zip(together, logits, strict=True):
                    found[answer] = _tried(lambda answer=answer, own=own: answer.take(own, began))
        return [found[answer] if answer in found else _tried(answer.advance) for answer in answers]


def _tried(action: Callable[[], str]) -> str | Exception:
    try:
        return action()
    except Exception as error:
        return error
