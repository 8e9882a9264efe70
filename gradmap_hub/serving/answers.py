"""The shapes of responses: chat and text completions, whole or as events."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gradmap_hub.serving import schemas
from gradmap_hub.serving.scheduler import Engine, Finished

if TYPE_CHECKING:
    from gradmap_hub.runtime import TokenScore


def usage(finished: Finished) -> schemas.Usage:
    """Return the number of tokens of a generation."""
    prompt, completion = finished.prompt_tokens, finished.completion_tokens
    return schemas.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Shape:
    """Builds the response to one request, whole or as events. All events of a request have the same id.

    Args:
        model: the name in the response.
        engine: for the texts of tokens.
        scored: whether log-probabilities are part of the response.
    """

    prefix: str
    object: str
    event: type[BaseModel]

    def __init__(self, model: str, engine: Engine, *, scored: bool) -> None:
        self._model = model
        self._engine = engine
        self._scored = scored
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def head(self) -> list[Any] | None:
        """Return the choices of the event before any text; None if there is no such event."""
        raise NotImplementedError

    def piece(self, text: str, scores: Sequence[TokenScore]) -> list[Any]:
        raise NotImplementedError

    def tail(self, finished: Finished) -> list[Any]:
        raise NotImplementedError

    def whole(self, text: str, scores: Sequence[TokenScore], finished: Finished) -> BaseModel:
        raise NotImplementedError

    def chunk(self, choices: list[Any], extra: Mapping[str, Any]) -> BaseModel:
        return self.event(**self._fields(self.object), choices=choices, **extra)

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _text(self, token: int) -> str:
        """Return the text of a token; as the OpenAI API writes it if it is a part of a character."""
        data = self._engine.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Chat(Shape):
    """The response to a chat request."""

    prefix = "chatcmpl"
    object = "chat.completion.chunk"
    event = schemas.ChatChunk

    def head(self) -> list[schemas.ChunkChoice]:
        return [self._choice(schemas.Delta(role="assistant", content=""))]

    def piece(self, text: str, scores: Sequence[TokenScore]) -> list[schemas.ChunkChoice]:
        return [self._choice(schemas.Delta(content=text), logprobs=self._logprobs(scores))]

    def tail(self, finished: Finished) -> list[schemas.ChunkChoice]:
        return [self._choice(schemas.Delta(), finished.reason)]

    def whole(self, text: str, scores: Sequence[TokenScore], finished: Finished) -> schemas.ChatCompletion:
        choice = schemas.ChatChoice(
            index=0,
            message=schemas.ChatMessage(role="assistant", content=text, refusal=None),
            logprobs=self._logprobs(scores),
            finish_reason=finished.reason,
        )
        return schemas.ChatCompletion(**self._fields("chat.completion"), choices=[choice], usage=usage(finished))

    def _choice(
        self, delta: schemas.Delta, reason: schemas.Reason | None = None, logprobs: schemas.ChatLogprobs | None = None
    ) -> schemas.ChunkChoice:
        return schemas.ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, scores: Sequence[TokenScore]) -> schemas.ChatLogprobs | None:
        if not self._scored:
            return None
        content = [
            schemas.ChatLogprob(
                **self._logprob(each.token, each.logprob or 0.0),
                top_logprobs=[schemas.TopLogprob(**self._logprob(token, value)) for token, value in each.top],
            )
            for each in scores
        ]
        return schemas.ChatLogprobs(content=content, refusal=None)

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": value, "bytes": list(self._engine.token_bytes(token))}


class Completion(Shape):
    """The response to a completion request.

    Args:
        echo: text of the prompt, if the response begins with it.
        echoed: number of its tokens, if they are scored.
    """

    prefix = "cmpl"
    object = "text_completion"
    event = schemas.TextCompletion

    def __init__(self, model: str, engine: Engine, *, scored: bool, echo: str = "", echoed: int = 0) -> None:
        super().__init__(model, engine, scored=scored)
        self._echo = echo
        self._echoed = echoed
        self._offset = _Offset()

    def head(self) -> None:
        return None

    def piece(self, text: str, scores: Sequence[TokenScore]) -> list[schemas.TextChoice]:
        return [self._choice(text, logprobs=self._logprobs(scores))]

    def tail(self, finished: Finished) -> list[schemas.TextChoice]:
        return [self._choice("", finished.reason)]

    def whole(self, text: str, scores: Sequence[TokenScore], finished: Finished) -> schemas.TextCompletion:
        choice = self._choice(text, finished.reason, self._logprobs(scores))
        return schemas.TextCompletion(**self._fields(self.object), choices=[choice], usage=usage(finished))

    def _choice(
        self, text: str, reason: schemas.Reason | None = None, logprobs: schemas.TextLogprobs | None = None
    ) -> schemas.TextChoice:
        return schemas.TextChoice(index=0, text=text, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, scores: Sequence[TokenScore]) -> schemas.TextLogprobs | None:
        if not self._scored:
            return None
        tops: list[dict[str, float] | None] = []
        for each in scores:
            if each.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            # Two tokens may have the same text; the more probable one stands for both.
            for token, value in (*each.top, (each.token, each.logprob)):
                top.setdefault(self._text(token), value)
            tops.append(top)
        offsets = self._prompt_offsets([each.token for each in scores[: self._echoed]])
        self._echoed -= len(offsets)
        offsets += [self._offset.before(self._shown(each.token)) for each in scores[len(offsets) :]]
        return schemas.TextLogprobs(
            tokens=[self._text(each.token) for each in scores],
            token_logprobs=[each.logprob for each in scores],
            top_logprobs=tops,
            text_offset=offsets,
        )

    def _shown(self, token: int) -> bytes:
        return b"" if self._engine.is_special(token) else self._engine.token_bytes(token)

    def _prompt_offsets(self, tokens: Sequence[int]) -> list[int]:
        """Return where each token of the prompt begins in `echo`; those of the output continue after it.

        A tokenizer may add a start token or a space, which the text of the prompt does not have.
        """
        if not tokens:
            return []
        prompt = _Offset()
        offsets = [prompt.before(self._engine.token_bytes(token)) for token in tokens]
        added = max(0, prompt.length - len(self._echo))
        self._offset = _Offset(len(self._echo))
        return [max(0, offset - added) for offset in offsets]


class _Offset:
    """Counts the characters of tokens; those of a character that several tokens make are counted with the last one."""

    def __init__(self, length: int = 0) -> None:
        self.length = length
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, token: bytes) -> int:
        """Add a token and return where it begins."""
        start = self.length
        self.length += len(self._decoder.decode(token))
        return start
