"""Builds the responses to chat and completion requests, whole or as server-sent events."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gradmap_hub.serving import responses
from gradmap_hub.serving.delivery import Piece
from gradmap_hub.serving.engine import Engine
from gradmap_hub.serving.scheduler import Finished, Work

if TYPE_CHECKING:
    from gradmap_hub.runtime import TokenScore
    from gradmap_hub.runtime.tool_calls import FoundCall


class Shape:
    """Builds the response to one request, whole or as events. All events of a request have the same id.

    Args:
        model: the name in the response.
        engine: decodes the tokens of log-probabilities.
        works: the input of each choice.
        per_prompt: number of choices per prompt.
    """

    prefix: str
    object: str
    event: type[BaseModel]

    def __init__(self, model: str, engine: Engine, works: Sequence[Work], *, per_prompt: int) -> None:
        self._model = model
        self._engine = engine
        self._works = works
        self._per_prompt = per_prompt
        self._pieces: list[list[Piece]] = [[] for _ in works]
        self._finished: dict[int, Finished] = {}
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are part of the response."""
        return self._works[0].scoring is not None

    def heads(self) -> list[list[Any]]:
        """Return the events before any text, each as the list of its choices."""
        return []

    def events_of(self, piece: Piece) -> list[list[Any]]:
        """Return the events for a piece, each as the list of its choices."""
        if piece.finished is not None:
            self._finished[piece.index] = piece.finished
        return [[delta] for delta in self._deltas(piece)]

    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""
        self._pieces[piece.index].append(piece)
        if piece.finished is not None:
            self._finished[piece.index] = piece.finished

    def whole(self) -> BaseModel:
        """Return the whole response, built from the pieces that were added."""
        choices = [
            self._choice(
                Piece(
                    index,
                    "".join(piece.text for piece in pieces),
                    [each for piece in pieces for each in piece.scores],
                    self._finished[index],
                )
            )
            for index, pieces in enumerate(self._pieces)
        ]
        return self._response(choices)

    def usage(self) -> responses.Usage:
        """Return the token counts; the tokens of a prompt are counted once, however many choices it has."""
        finished = [self._finished[index] for index in range(len(self._works))]
        prompt = sum(each.prompt_tokens for each in finished[:: self._per_prompt])
        completion = sum(each.completion_tokens for each in finished)
        cached = sum(each.cached_tokens for each in finished[:: self._per_prompt])
        return responses.Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=responses.PromptDetails(cached_tokens=cached),
        )

    def chunk(self, choices: list[Any], extra: Mapping[str, Any]) -> BaseModel:
        """Return the event with these choices; `extra`: further fields, such as usage."""
        return self.event(**self._fields(self.object), choices=choices, **extra)

    def _deltas(self, piece: Piece) -> list[Any]:
        """Return the choice of each event for a piece."""
        raise NotImplementedError

    def _choice(self, piece: Piece) -> Any:
        """Return a choice of the whole response, given all its text as one piece."""
        raise NotImplementedError

    def _response(self, choices: list[Any]) -> BaseModel:
        raise NotImplementedError

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _text(self, token: int) -> str:
        """Return the text of a token; if it is a part of a character, its bytes as the OpenAI API writes them."""
        data = self._engine.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Chat(Shape):
    """The response to a chat request."""

    prefix = "chatcmpl"
    object = "chat.completion.chunk"
    event = responses.ChatChunk

    def heads(self) -> list[list[responses.ChunkChoice]]:
        first = responses.Delta(role="assistant", content="")
        return [
            [responses.ChunkChoice(index=index, delta=first, logprobs=None, finish_reason=None)]
            for index in range(len(self._works))
        ]

    def __init__(self, model: str, engine: Engine, works: Sequence[Work], *, per_prompt: int) -> None:
        super().__init__(model, engine, works, per_prompt=per_prompt)
        self._parsers = [None if work.tools is None else work.tools.parser() for work in works]

    def _deltas(self, piece: Piece) -> list[responses.ChunkChoice]:
        parser = self._parsers[piece.index]
        if piece.finished is not None:
            end = responses.ChunkChoice(
                index=piece.index, delta=responses.Delta(), logprobs=None, finish_reason=self._reason(piece)
            )
            rest = "" if parser is None else parser.rest()
            return [*([self._chunk(piece.index, responses.Delta(content=rest))] if rest else []), end]
        if parser is None:
            return [self._chunk(piece.index, responses.Delta(content=piece.text), piece.scores)]
        number = parser.calls
        text, found = parser.add(piece.text)
        delta: dict[str, Any] = {"content": text} if text else {}
        if found:
            calls = self._calls(piece.index, found)
            delta["tool_calls"] = [
                responses.ToolCallDelta(index=number + place, **call.model_dump()) for place, call in enumerate(calls)
            ]
        if not delta and not piece.scores:
            return []
        return [self._chunk(piece.index, responses.Delta(**delta), piece.scores)]

    def _chunk(self, index: int, delta: responses.Delta, scores: Sequence[TokenScore] = ()) -> responses.ChunkChoice:
        return responses.ChunkChoice(index=index, delta=delta, logprobs=self._logprobs(scores), finish_reason=None)

    def _reason(self, piece: Piece) -> responses.Reason:
        """Return the finish reason: "tool_calls" for "stop" after a call, unless the request named the function."""
        assert piece.finished is not None
        parser, use = self._parsers[piece.index], self._works[piece.index].tools
        called = parser is not None and parser.calls and use is not None and use.named is None
        return "tool_calls" if called and piece.finished.reason == "stop" else piece.finished.reason

    def _calls(self, index: int, found: Sequence[FoundCall]) -> list[responses.ToolCall]:
        use = self._works[index].tools
        length = None if use is None else use.row.id_length
        return [
            responses.ToolCall(
                id=f"call_{secrets.token_hex(12)}" if length is None else secrets.token_hex(length)[:length],
                type="function",
                function=responses.CalledFunction(name=each.name, arguments=each.arguments),
            )
            for each in found
        ]

    def _choice(self, piece: Piece) -> responses.ChatChoice:
        parser = self._parsers[piece.index]
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if parser is not None:
            text, found = parser.add(piece.text)
            message["content"] = text + parser.rest()
            if found:
                message["content"] = message["content"] or None
                message["tool_calls"] = self._calls(piece.index, found)
        return responses.ChatChoice(
            index=piece.index,
            message=responses.ChatMessage(**message),
            logprobs=self._logprobs(piece.scores),
            finish_reason=self._reason(piece),
        )

    def _response(self, choices: list[responses.ChatChoice]) -> responses.ChatCompletion:
        return responses.ChatCompletion(**self._fields("chat.completion"), choices=choices, usage=self.usage())

    def _logprobs(self, scores: Sequence[TokenScore]) -> responses.ChatLogprobs | None:
        if not self.scored:
            return None
        content = [
            responses.ChatLogprob(
                **self._logprob(each.token, each.logprob or 0.0),
                top_logprobs=[responses.TopLogprob(**self._logprob(token, value)) for token, value in each.top],
            )
            for each in scores
        ]
        return responses.ChatLogprobs(content=content, refusal=None)

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": value, "bytes": list(self._engine.token_bytes(token))}


class Completion(Shape):
    """The response to a completion request."""

    prefix = "cmpl"
    object = "text_completion"
    event = responses.TextCompletion

    def __init__(self, model: str, engine: Engine, works: Sequence[Work], *, per_prompt: int) -> None:
        super().__init__(model, engine, works, per_prompt=per_prompt)
        self._offsets = [_Offset() for _ in works]
        # Number of prompt tokens, for each choice, whose scores are still to be delivered.
        self._echoed = [len(work.prompt) if work.scoring and work.scoring.prompt else 0 for work in works]

    def _deltas(self, piece: Piece) -> list[responses.TextChoice]:
        reason = piece.finished.reason if piece.finished else None
        logprobs = None if reason else self._logprobs(piece.index, piece.scores)
        return [responses.TextChoice(index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=reason)]

    def _choice(self, piece: Piece) -> responses.TextChoice:
        assert piece.finished is not None
        return responses.TextChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece.index, piece.scores),
            finish_reason=piece.finished.reason,
        )

    def _response(self, choices: list[responses.TextChoice]) -> responses.TextCompletion:
        return responses.TextCompletion(**self._fields(self.object), choices=choices, usage=self.usage())

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> responses.TextLogprobs | None:
        if not self.scored:
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
        offsets = self._prompt_offsets(index, [each.token for each in scores[: self._echoed[index]]])
        output = self._offsets[index]
        offsets += [output.before(self._shown(each.token)) for each in scores[len(offsets) :]]
        return responses.TextLogprobs(
            tokens=[self._text(each.token) for each in scores],
            token_logprobs=[each.logprob for each in scores],
            top_logprobs=tops,
            text_offset=offsets,
        )

    def _shown(self, token: int) -> bytes:
        return b"" if self._engine.is_special(token) else self._engine.token_bytes(token)

    def _prompt_offsets(self, index: int, tokens: Sequence[int]) -> list[int]:
        """Return where each token of the prompt begins in the text that is echoed; those of the output follow it.

        A tokenizer may add a start token or a space, which the text of the prompt does not have.
        """
        if not tokens:
            return []
        self._echoed[index] = 0
        length = len(self._works[index].echo)
        prompt = _Offset()
        offsets = [prompt.before(self._engine.token_bytes(token)) for token in tokens]
        added = max(0, prompt.length - length)
        self._offsets[index] = _Offset(length)
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
