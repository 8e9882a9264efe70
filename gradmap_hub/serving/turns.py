"""Converts the messages of a request for the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.schemas import Message, ToolCall

# A template that inserts the role of a message unchanged supports the role `tool` too.
_WRITES_ROLES = re.compile(r"\{\{[^{}]*\brole\b")


def turns_for(template: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages for a chat template. If it does not support tool calls, they are JSON in the content.

    Raises:
        ApiError: 400, the template does not support tool results.
    """
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        # OpenAI's developer role is the system role in the chat templates of open models.
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.text}
        if role == "tool":
            if "tool" not in template and not _WRITES_ROLES.search(template):
                param = f"messages[{place}].role"
                said = f"{param}: the chat template of this model does not support tool results."
                raise ApiError(400, said, param=param, code="unsupported_value")
            named = {"tool_call_id": message.tool_call_id, "name": message.name}
            turn |= {name: value for name, value in named.items() if value is not None}
        if message.tool_calls:
            calls = [_call(call) for call in message.tool_calls]
            if "tool_calls" in template:
                turn["tool_calls"] = calls
            else:
                lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
                turn["content"] = "\n".join([*([message.text] if message.text else []), *lines])
        turns.append(turn)
    return turns


def _call(call: ToolCall) -> dict[str, Any]:
    """Return a call with its arguments as an object, which chat templates expect."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):  # what a model has written need not be JSON
        arguments = None
    if not isinstance(arguments, dict):
        arguments = call.function.arguments
    named = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return named if call.id is None else {"id": call.id, **named}
