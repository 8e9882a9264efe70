"""/v1/responses, with the client of OpenAI; /tokenizer_info."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gradmap_hub.serving.answers import Work
from gradmap_hub.serving.delivery import Piece
from gradmap_hub.serving.responses_answer import Responses
from gradmap_hub.serving.responses_request import ResponsesRequest
from gradmap_hub.serving.scheduler import Finished
from gradmap_hub.serving.tools import Tool, ToolUse

openai = pytest.importorskip("openai")
ROUTE = "/v1/responses"
library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="of the extra json")


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_an_answer_is_that_of_a_chat(client: Any, model: Any, kit: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = model.encode_chat(turns)
    options = {"model": kit.name, "temperature": 0, "max_output_tokens": 12, "instructions": "Be brief."}
    for given in ("Hi", [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]):
        answer = client.responses.create(input=given, **options)
        assert answer.output_text == kit.alone(model, ids, 12)
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage.input_tokens == len(ids) and answer.usage.output_tokens == 12


def test_the_next_turn(client: Any, model: Any, kit: Any) -> None:
    first = client.responses.create(model=kit.name, input="Hi", temperature=0, max_output_tokens=9)
    said = [each.model_dump(exclude_none=True) for each in first.output]
    again = [{"role": "user", "content": "Hi"}, *said, {"role": "user", "content": "And?"}]
    answer = client.responses.create(model=kit.name, input=again, temperature=0, max_output_tokens=9)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first.output_text}]
    assert answer.output_text == kit.alone(model, model.encode_chat([*turns, {"role": "user", "content": "And?"}]), 9)


def test_it_is_streamed(client: Any, model: Any, kit: Any) -> None:
    with client.responses.stream(model=kit.name, input="Hi", temperature=0, max_output_tokens=20) as stream:
        events = list(stream)
    whole = events[-1].response
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    wanted = kit.alone(model, model.encode_chat([{"role": "user", "content": "Hi"}]), 20)
    assert whole.output_text == "".join(event.delta for event in events[4:-4]) == wanted


@library
def test_a_format(client: Any, kit: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    answer = client.responses.create(model=kit.name, input="Hi", text=text, temperature=0)
    assert json.loads(answer.output_text)["a"] in (1, 2) and answer.status == "completed"


def test_calls_and_their_results(model: Any) -> None:
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    asked = ResponsesRequest.model_validate(
        {
            "model": "m",
            "tools": [flat],
            "tool_choice": {"type": "function", "name": "f"},
            "input": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "c"},
            ],
        }
    )
    chat = asked.chat()
    assert [turn.role for turn in chat.messages] == ["user", "assistant", "tool"]
    calls = chat.messages[1].tool_calls
    assert calls is not None and [call.id for call in calls] == ["1", "2"] and chat.messages[1].text == "b"
    assert chat.tools is not None and chat.tools[0].function.name == "f"
    from gradmap_hub.runtime.tool_formats import FORMATS

    row = next(row for row in FORMATS if row.name == "hermes")
    use = ToolUse.of(row, [Tool.model_validate(tool.model_dump()) for tool in chat.tools], "auto", None)
    shape = Responses("m", asked, Work([5], 9, None, tools=use))  # pyright: ignore[reportArgumentType]
    events = [*shape.begin()]
    for text in ("See. <tool_", 'call>{"name": "f", "arguments": {"x": 1}}</tool_call>'):
        events += shape.add(Piece(0, text))
    events += shape.add(Piece(0, "", finished=Finished("stop", 1, 2, None)))
    message, call = shape.whole()["output"]
    assert message["content"][0]["text"] == "See." and (call["name"], call["arguments"]) == ("f", '{"x": 1}')
    assert [event["type"] for event in events][-5:] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip


def test_what_is_refused_is_named(served: Any, kit: Any) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "Hi", "conversation": "c"}, "conversation"),
        ({"input": "Hi", "background": True}, "background"),
        ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "Hi", "temperature": 3.0}, "temperature"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"input": "Hi", "tools": [{"type": "function", "name": "f"}]}, "tools"),  # the template has none
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "Explain. " * 20_000}, "input"),
        ({"input": "Explain. " * 1000}, "input"),
    ):
        answer = httpx.post(served.url + ROUTE, json={"model": kit.name, **body})
        assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
        assert answer.json()["error"]["param"] == param, answer.text


def test_the_tokenizer_is_described(served: Any, model: Any, kit: Any) -> None:
    found = httpx.get(served.url + "/tokenizer_info").json()
    assert found["chat_template"] == model.chat_template and found["model_max_length"] == kit.context
    assert found["eos_token"] == model.decode([min(model.end_ids)])
