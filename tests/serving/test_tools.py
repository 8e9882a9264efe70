"""Calls of tools: required ones, those that a model writes by itself, streamed and whole, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradmap_hub import runtime
from gradmap_hub.runtime.tool_formats import FORMATS
from gradmap_hub.serving.answers import Chat
from gradmap_hub.serving.delivery import Piece
from gradmap_hub.serving.scheduler import Finished, Work
from gradmap_hub.serving.tools import Tool, ToolUse

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "Which city?"}]
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> Write <tool_call>.{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Köln"]}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="of the extra json")


@pytest.fixture(scope="module")
def model(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(shutil.copytree(tiny_onnx, tmp_path_factory.mktemp("tools") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return runtime.load(folder, threads=1)


@pytest.fixture(scope="module")
def web(model: Any, kit: Any) -> Iterator[httpx.Client]:
    with kit.serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def streamed(web: httpx.Client, kit: Any, **body: Any) -> list[Any]:
    body = {"model": kit.name, "messages": TURNS, "stream": True, "temperature": 0, **body}
    answer = web.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    *chunks, done = kit.events(iter(answer.text.split("\n")))
    assert done == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks]


@library
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
def test_a_call_may_be_required(web: httpx.Client, kit: Any, choice: Any, reason: str) -> None:
    body = {"tools": [TIME, WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300}
    (answer,) = kit.asked(web, CHAT, messages=TURNS, **body)["choices"]
    message = answer["message"]
    (call,) = message["tool_calls"]
    assert answer["finish_reason"] == reason and message["content"] is None and call["type"] == "function"
    assert call["id"].startswith("call_")
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if choice == NAMED or name == "get_weather":
        assert name == "get_weather" and arguments["city"] in ("Paris", "Köln")
    first, *deltas, last = streamed(web, kit, **body)
    assert first["delta"] == {"role": "assistant", "content": ""}
    (delta,) = [each["delta"] for each in deltas]
    assert list(delta) == ["tool_calls"] and delta["tool_calls"][0]["function"] == call["function"]
    assert delta["tool_calls"][0]["index"] == 0 and last["finish_reason"] == reason and last["delta"] == {}


@library
def test_arguments_end(web: httpx.Client, kit: Any) -> None:
    """A schema that does not say so allows endless integers, and arguments that the function does not have."""
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/B"}},
        "required": ["a", "b"],
        "$defs": {"B": {"type": "array", "items": {"type": "integer"}, "maxItems": 1}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    (choice,) = kit.asked(web, CHAT, messages=TURNS, **body)["choices"]
    (call,) = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"a", "b"} and abs(arguments["a"]) < 2**53


@library
def test_each_choice_has_its_own_calls(web: httpx.Client, kit: Any) -> None:
    body = {"tools": [WEATHER], "tool_choice": "required", "n": 4, "max_tokens": 400, "temperature": 1.5, "seed": 1}
    choices = kit.asked(web, CHAT, messages=TURNS, **body)["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) >= 4


@library
def test_a_call_or_an_answer_of_a_format(web: httpx.Client, kit: Any) -> None:
    schema = {"name": "a", "schema": {"enum": ["no"]}}
    body = {"tools": [WEATHER], "response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 300}
    (choice,) = kit.asked(web, CHAT, messages=TURNS, **body)["choices"]
    message = choice["message"]
    assert (message["content"] == '"no"') != bool(message.get("tool_calls")) and choice["finish_reason"] != "length"


def test_the_template_shows_the_tools(model: Any, web: httpx.Client, kit: Any) -> None:
    shown = web.post("/tokenize", json={"messages": TURNS, "tools": [WEATHER, TIME]}).json()["tokens"]
    text = model.decode(shown)
    assert '"name": "get_weather", "description": "Weather"' in text and '"name": "get_time"' in text
    asked = kit.asked(web, CHAT, messages=TURNS, tools=[WEATHER, TIME], max_tokens=1)
    assert asked["usage"]["prompt_tokens"] == len(shown)
    without = kit.asked(web, CHAT, messages=TURNS, tools=[WEATHER], tool_choice="none", max_tokens=1)
    assert without["usage"]["prompt_tokens"] == len(model.encode_chat(TURNS))


def test_answers_without_calls_are_those_of_a_lone_request(model: Any, web: httpx.Client, kit: Any) -> None:
    tools = [WEATHER, TIME]
    (choice,) = kit.asked(web, CHAT, messages=TURNS, tools=tools, max_tokens=20)["choices"]
    ids = model.encode_chat(TURNS, tools=[Tool.model_validate(tool).shown for tool in tools])
    assert choice["message"]["content"] == kit.alone(model, ids, 20)
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "length"
    chunks = streamed(web, kit, tools=tools, max_tokens=20)
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == choice["message"]["content"]


def said(model: Any, pieces: Sequence[str], reason: Any = "stop", **options: Any) -> tuple[Any, list[Any]]:
    """The whole response to what a model writes, and its streamed choices."""
    row = options.pop("row", model.tool_format)
    tools = [Tool.model_validate(tool) for tool in (WEATHER, TIME)]
    use = ToolUse.of(row, tools, options.pop("choice", "auto"), options.pop("parallel", None))
    work = Work([5], 99, None, tools=use)  # pyright: ignore[reportArgumentType]  # nothing is sampled
    end = Piece(0, "", finished=Finished(reason, 1, 9, None))
    whole, events = (Chat("m", model, [work], per_prompt=1) for _ in range(2))
    for piece in pieces:
        whole.add(Piece(0, piece))
    whole.add(end)
    found = [event for piece in (*(Piece(0, text) for text in pieces), end) for event in events.events_of(piece)]
    chunks = [choice.model_dump(exclude_unset=True) for (choice,) in found]
    return whole.whole().model_dump(exclude_unset=True)["choices"][0], chunks


def test_calls_that_a_model_writes_by_itself(model: Any) -> None:
    text = (
        'Let me see.\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    )
    pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
    whole, chunks = said(model, pieces)
    calls = [call["function"] for call in whole["message"]["tool_calls"]]
    assert calls == [
        {"name": "get_time", "arguments": "{}"}, {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    ]  # fmt: skip
    assert whole["message"]["content"] == "Let me see." and whole["finish_reason"] == "tool_calls"
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    made = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in made] == [0, 1] and [call["function"] for call in made] == calls
    assert chunks[-1]["finish_reason"] == "tool_calls" and all(delta for delta in deltas[:-1])
    one, _ = said(model, pieces, parallel=False)
    assert [call["function"] for call in one["message"]["tool_calls"]] == calls[:1]
    cut, chunks = said(model, pieces[:-9], reason="length")
    assert cut["finish_reason"] == chunks[-1]["finish_reason"] == "length"
    assert cut["message"]["content"].startswith("Let me see.") and chunks[-2]["delta"]["content"]


def test_ids_are_those_of_the_family(model: Any) -> None:
    row = next(row for row in FORMATS if row.name == "mistral")
    whole, _ = said(model, ['[TOOL_CALLS][{"name": "get_time", "arguments": {}}]'], row=row)
    (call,) = whole["message"]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()


def test_what_is_refused_is_named(web: httpx.Client, kit: Any) -> None:
    for body, param in (
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": {}}, "tools"),
        ({"tools": [WEATHER] * 500}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TIME], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [TIME], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "a" * 200_000}}]}, "messages"),
    ):
        answer = web.post(CHAT, json={"model": kit.name, "messages": TURNS, "max_tokens": 1, **body})
        assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
        assert answer.json()["error"]["param"] == param, answer.text


@library
def test_a_schema_that_cannot_be_used_is_refused(web: httpx.Client, kit: Any) -> None:
    broken = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": broken}}
    body = {"model": kit.name, "messages": TURNS, "max_tokens": 5, "tools": [tool], "tool_choice": "required"}
    answer = web.post(CHAT, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
