"""POST /v1/responses: the text part of the Responses API, converted to a chat request."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.schemas import ChatRequest, MaxTokens, parse
from gradmap_hub.serving.settings import MAX_MESSAGES, MAX_VALUES
from gradmap_hub.serving.tools import Strict


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str


def _is_list(value: Any) -> str:
    return "~list" if isinstance(value, list) else "~text"


Texts = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[InputPart], Field(fail_fast=True), Tag("~list")],
    Discriminator(_is_list),
]


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts


class InputCall(Strict):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Texts


def _kind_of_item(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    return f"~{kind}" if kind in ("function_call", "function_call_output") else "~message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("~message")]
    | Annotated[InputCall, Tag("~function_call")]
    | Annotated[InputResult, Tag("~function_call_output")],
    Discriminator(_kind_of_item),
]
Input = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag("~list")],
    Discriminator(_is_list),
]


class OutputFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputText(Strict):
    format: OutputFormat | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses. Tools, tool_choice and sampling parameters are checked as in a chat request."""

    model: str
    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: OutputText | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None

    def chat(self) -> ChatRequest:
        """Return the same request as one for a chat.

        Raises:
            ApiError: 400; names the invalid parameter.
        """
        body: dict[str, Any] = {
            "model": self.model, "messages": self._messages(), "max_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls, "tool_choice": self.tool_choice,
        }  # fmt: skip
        if self.tools:
            body["tools"] = [
                {"type": tool.get("type"), "function": {name: each for name, each in tool.items() if name != "type"}}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, dict):
            body["tool_choice"] = {
                "type": self.tool_choice.get("type"), "function": {"name": self.tool_choice.get("name")},
            }  # fmt: skip
        if self.text is not None and self.text.format is not None:
            wanted = self.text.format
            form: dict[str, Any] = {"type": wanted.type}
            if wanted.type == "json_schema":
                form["json_schema"] = {"name": wanted.name or "answer", "schema": wanted.schema_}
            body["response_format"] = form
        try:
            return parse(ChatRequest, json.dumps(body).encode(), most=2 * MAX_VALUES)
        except ApiError as error:
            raise renamed(error) from None

    def _messages(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputMessage):
                turns.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, InputResult):
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if turns and turns[-1]["role"] == "assistant":  # calls after a text, or several
                    turns[-1].setdefault("tool_calls", []).append(call)
                else:
                    turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
        return turns


_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


def renamed(error: ApiError) -> ApiError:
    """Return the error of a chat request with the name that its parameter has in the Responses API."""
    param = error.param
    if param is None:
        return error
    first = next((name for name in _NAMES if param.startswith(name)), None)
    own = param.replace(".function", "") if first is None else _NAMES[first] + param.removeprefix(first)
    own = "text.format" if first == "response_format" else own
    message = error.message.replace(param, own)
    return ApiError(error.status, message, kind=error.kind, param=own, code=error.code, headers=error.headers)


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
