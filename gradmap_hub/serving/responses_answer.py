"""Builds the responses of the Responses API: whole, or as named and numbered events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gradmap_hub.serving.delivery import Piece
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.responses_request import ResponsesRequest
from gradmap_hub.serving.scheduler import Finished, Work

if TYPE_CHECKING:
    from gradmap_hub.runtime.tool_calls import FoundCall

Event = dict[str, Any]


class Responses:
    """Builds the response to one request: `add` takes pieces and yields events; `whole` returns the response."""

    def __init__(self, model: str, asked: ResponsesRequest, work: Work) -> None:
        self._asked = asked
        self._model = model
        self._parser = None if work.tools is None else work.tools.parser()
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the message that is being written
        self._finished: Finished | None = None
        self._number = -1

    def begin(self) -> Iterator[Event]:
        """Yield the events before any text."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.whole())

    def add(self, piece: Piece) -> Iterator[Event]:
        """Add a piece to the response and yield its events, all of which the caller must consume."""
        text, calls = piece.text, []
        if self._parser is not None:
            text, calls = self._parser.add(piece.text)
            if piece.finished is not None:
                text += self._parser.rest()
        if text:
            yield from self._write(text)
        for call in calls:
            yield from self._close()
            yield from self._call(call)
        if piece.finished is not None:
            if not self._output and self._open is None:
                yield from self._write("")  # an answer without any text is an empty message
            self._finished = piece.finished
            yield from self._close()
            cut = piece.finished.reason == "length"
            yield self._event("response.incomplete" if cut else "response.completed", response=self.whole())

    def failed(self, error: ApiError) -> Event:
        """Return the last event of an answer that failed."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def whole(self) -> dict[str, Any]:
        """Return the response so far."""
        asked, finished = self._asked, self._finished
        cut = finished is not None and finished.reason == "length"
        given = (
            asked.text.format.model_dump(by_alias=True, exclude_none=True) if asked.text and asked.text.format else None
        )
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if finished is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": [*self._output, *([self._open] if self._open else [])],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": given or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "usage": None if finished is None else _usage(finished),
        }

    def _write(self, text: str) -> Iterator[Event]:
        if self._open is None:
            self._open = {
                "id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "status": "in_progress",
                "content": [],
            }  # fmt: skip
            yield self._event("response.output_item.added", **self._place(), item=dict(self._open, content=[]))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("response.content_part.added", **self._part(), part=dict(part))
            self._open["content"].append(part)
        self._open["content"][0]["text"] += text
        if text:
            yield self._event("response.output_text.delta", **self._part(), delta=text, logprobs=[])

    def _close(self) -> Iterator[Event]:
        """End the message that is being written, if there is one."""
        item = self._open
        if item is None:
            return
        (part,) = item["content"]
        yield self._event("response.output_text.done", **self._part(), text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **self._part(), part=part)
        cut = self._finished is not None and self._finished.reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        yield self._event("response.output_item.done", **self._place(), item=item)
        self._output.append(item)
        self._open = None

    def _call(self, call: FoundCall) -> Iterator[Event]:
        item = {
            "id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": f"call_{secrets.token_hex(12)}",
            "name": call.name, "arguments": call.arguments, "status": "completed",
        }  # fmt: skip
        place = {"output_index": len(self._output)}
        added = dict(item, arguments="", status="in_progress")
        yield self._event("response.output_item.added", **place, item=added)
        own = {**place, "item_id": item["id"]}
        yield self._event("response.function_call_arguments.delta", **own, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **own, name=call.name, arguments=call.arguments)
        yield self._event("response.output_item.done", **place, item=item)
        self._output.append(item)

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output)}

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], **self._place(), "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
