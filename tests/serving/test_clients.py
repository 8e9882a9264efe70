"""What clients of other servers send: honoured, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gradmap_hub.serving import schemas
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.turns import turns_for

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TURNS = [{"role": "user", "content": "Explain gravity."}]
PROMPT = "The capital of France"


def refusal(web: httpx.Client, kit: Any, route: str, **body: Any) -> Any:
    answer = web.post(route, json={"model": kit.name, "max_tokens": 4, **body})
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    return answer.json()["error"]


# -- the end of an answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_both_names_of_the_maximum(web: httpx.Client, kit: Any, route: str) -> None:
    given = {"messages": TURNS, "prompt": PROMPT}
    for options in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        assert kit.asked(web, route, **given, **options)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_ignore_eos_and_min_tokens(web: httpx.Client, model: Any, kit: Any, route: str) -> None:
    ending = {"logit_bias": {str(token): 100 for token in model.end_ids}, "max_tokens": 12}
    body = {"messages": TURNS, "prompt": PROMPT} | ending

    def outcome(**options: Any) -> tuple[int, str]:
        answer = kit.asked(web, route, **body, **options)
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    assert outcome() == outcome(ignore_eos=False, min_tokens=0) == (0, "stop")
    assert outcome(min_tokens=5) == (5, "stop")
    assert outcome(min_tokens=12) == (12, "length")
    assert outcome(ignore_eos=True) == (12, "length")
    assert refusal(web, kit, route, **body, min_tokens=13)["param"] == "min_tokens"
    assert refusal(web, kit, route, **body, min_tokens=-1)["param"] == "min_tokens"
    assert refusal(web, kit, route, **body, ignore_eos="yes")["param"] == "ignore_eos"


# -- the end of a prompt -------------------------------------------------------------------------------------------


def test_continuing_the_last_message(web: httpx.Client, model: Any, kit: Any) -> None:
    turns = [*TURNS, {"role": "assistant", "content": "An apple falls"}]
    for begin in (False, None):
        answer = kit.asked(
            web, CHAT, messages=turns, max_tokens=8, continue_final_message=True, add_generation_prompt=begin
        )
        ids = model.encode_chat(turns, continue_final_message=True)
        assert answer["choices"][0]["message"]["content"] == kit.alone(model, ids, 8)
        assert answer["usage"]["prompt_tokens"] == len(ids) < len(model.encode_chat(turns))
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(web, kit, CHAT, messages=turns, **both)["param"] == "continue_final_message"
    empty = [*TURNS, {"role": "assistant", "content": ""}]
    assert refusal(web, kit, CHAT, messages=empty, continue_final_message=True)["param"] == "messages"


def test_no_generation_prompt(web: httpx.Client, model: Any, kit: Any) -> None:
    answer = kit.asked(web, CHAT, messages=TURNS, max_tokens=8, add_generation_prompt=False)
    ids = model.encode_chat(TURNS, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"] == kit.alone(model, ids, 8)


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
def test_a_completion_has_no_template(web: httpx.Client, kit: Any, name: str) -> None:
    error = refusal(web, kit, PLAIN, prompt=PROMPT, **{name: True})
    assert error["param"] == name and error["code"] == "unsupported_parameter"


# -- messages ------------------------------------------------------------------------------------------------------

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
PLAIN_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}{% endfor %}"
)


def parsed(*messages: dict[str, Any]) -> Any:
    body = json.dumps({"model": "a", "messages": list(messages)}).encode()
    return schemas.parse(schemas.ChatRequest, body, most=1000).messages


def test_a_turn_of_tools_is_answered(web: httpx.Client, model: Any, kit: Any) -> None:
    """As agents send it: the call without content, and its result. The tiny model's template has no tool calls."""
    turns = [
        *TURNS,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 degrees"}]},
    ]
    answer = kit.asked(web, CHAT, messages=turns, max_tokens=8)
    rendered = [
        *TURNS,
        {"role": "assistant", "content": '{"name": "weather", "arguments": {"city": "Köln"}}'},
        {"role": "tool", "content": "21 degrees"},
    ]
    assert answer["choices"][0]["message"]["content"] == kit.alone(model, model.encode_chat(rendered), 8)


def test_no_content_is_no_text(web: httpx.Client, model: Any, kit: Any) -> None:
    wanted = kit.alone(model, model.encode_chat([*TURNS, {"role": "assistant", "content": ""}, *TURNS]), 8)
    for turn in ({"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": ""}):
        answer = kit.asked(web, CHAT, messages=[*TURNS, turn, *TURNS], max_tokens=8)
        assert answer["choices"][0]["message"]["content"] == wanted


def test_templates_with_tool_calls_get_them() -> None:
    asked_calls = parsed({"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]})
    (turn,) = turns_for(TOOL_TEMPLATE, asked_calls)
    function = {"name": "weather", "arguments": {"city": "Köln"}}
    assert turn["content"] == "Let me see." and turn["tool_calls"] == [CALL | {"function": function}]
    (turn,) = turns_for(PLAIN_TEMPLATE, asked_calls)
    assert turn == {
        "role": "assistant",
        "content": 'Let me see.\n{"name": "weather", "arguments": {"city": "Köln"}}',
    }


@pytest.mark.parametrize("arguments", ["", "not JSON", "[1]", "[" * 5000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    (turn,) = turns_for(TOOL_TEMPLATE, parsed({"role": "assistant", "tool_calls": [call]}))
    assert turn["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_result_that_the_template_would_leave_out_is_refused() -> None:
    result = parsed({"role": "tool", "content": "21", "tool_call_id": "call_1", "name": "weather"})
    assert turns_for(PLAIN_TEMPLATE, result)[0]["tool_call_id"] == "call_1"
    with pytest.raises(ApiError, match=r"messages\[0\].role"):
        turns_for("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", result)


def test_tools_that_are_not_to_be_called(web: httpx.Client, model: Any, kit: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    answer = kit.asked(web, CHAT, messages=TURNS, max_tokens=8, tools=tools, tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == kit.alone(model, model.encode_chat(TURNS), 8)
    for choice in (None, "auto", "required", {"type": "function", "function": {"name": "weather"}}):
        error = refusal(web, kit, CHAT, messages=TURNS, tools=tools, tool_choice=choice)
        assert error["param"] == "tools" and error["code"] == "unsupported_parameter"
        assert error["message"].startswith("The model's chat template does not support tools")
    assert kit.asked(web, CHAT, messages=TURNS, max_tokens=1, tools=[], tool_choice="auto")["choices"]


# -- the name of the model -----------------------------------------------------------------------------------------


def test_another_name_is_answered_with_one_warning(model: Any, kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    with kit.serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        wanted = kit.alone(model, model.encode(PROMPT), 5)
        for name in ["gpt-4o", "gpt-4o", "line\nbreak\x1b[31m" * 1000, *(f"model {number}" for number in range(30))]:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
            answer = web.post(PLAIN, json=body).json()
            assert answer["choices"][0]["text"] == wanted and answer["model"] == kit.name
        warnings = [record.getMessage() for record in caplog.records if "--strict-model" in record.getMessage()]
        assert sum("'gpt-4o'" in warning for warning in warnings) == 1 and len(warnings) == 10
        assert all(warning.isprintable() and len(warning) < 600 for warning in warnings)
        assert (
            "enum" not in web.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]
        )
        assert web.get("/v1/models/gpt-4o").status_code == 404


def test_another_name_is_refused_if_names_are_strict(model: Any, kit: Any) -> None:
    with kit.serving(model, strict_model=True) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        for name in ("gpt-4o", "x" * 10_000):
            answer = web.post(PLAIN, json={"model": name, "prompt": PROMPT, "max_tokens": 1})
            assert answer.status_code == 404 and kit.is_refusal(answer.content) and len(answer.content) < 1500
        described = web.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
        assert described["properties"]["model"]["enum"] == [kit.name]


# -- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_of_a_prompt(web: httpx.Client, model: Any, kit: Any) -> None:
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "model": "other"}, {"prompt": PROMPT, "messages": None}):
        answer = web.post("/tokenize", json=body).json()
        ids = model.encode(PROMPT)
        assert answer == {"tokens": ids, "count": len(ids), "max_model_len": kit.context, "token_strs": None}
    assert web.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    long = web.post("/tokenize", json={"prompt": PROMPT * 5000, "add_special_tokens": False}).json()
    assert long["count"] > kit.context


def test_special_tokens_are_left_out_if_asked_for(web: httpx.Client, model: Any, kit: Any) -> None:
    def begins(text: str, *, special: bool = True) -> list[int]:
        return [1, *model.encode(text)] if special else model.encode(text)

    with kit.serving(Encoding(model, begins)) as server:
        for given, wanted in ((None, True), (True, True), (False, False)):
            body = {"prompt": PROMPT, "add_special_tokens": given}
            assert (httpx.post(server.url + "/tokenize", json=body).json()["tokens"][0] == 1) is wanted


class Encoding:
    """The real model with another `encode`."""

    def __init__(self, model: Any, encode: Any) -> None:
        self._model, self.encode = model, encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_tokens_of_messages(web: httpx.Client, model: Any) -> None:
    turns = [*TURNS, {"role": "assistant", "content": "An apple"}]
    for options in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        answer = web.post("/tokenize", json={"messages": turns, "add_special_tokens": False, **options})
        assert answer.json()["tokens"] == model.encode_chat(turns, **options)


def test_text_of_tokens(web: httpx.Client, model: Any) -> None:
    for text in (PROMPT, "schön 🦊", "<s>user: a</s>"):
        assert web.post("/detokenize", json={"tokens": model.encode(text)}).json() == {"prompt": text}
    assert web.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TURNS}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": TURNS, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 400_000]}, "tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(
    web: httpx.Client, kit: Any, route: str, body: dict[str, Any], param: str
) -> None:
    answer = web.post(route, json=body)
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    assert answer.json()["error"]["param"] == param


def test_tokens_need_a_place_and_give_it_back(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.05, slots=1, queue=0) as server, httpx.Client(base_url=server.url) as web:
        for _ in range(3):
            assert web.post("/tokenize", json={"prompt": "a"}).is_success
            assert web.post("/detokenize", json={"tokens": [400_000]}).status_code == 400
        body = {"model": kit.name, "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stream": True}
        with web.stream("POST", PLAIN, json=body) as answer:
            lines = answer.iter_lines()  # kept: its end closes the connection
            next(lines)
            assert httpx.post(server.url + "/tokenize", json={"prompt": "a"}).status_code == 429
        kit.wait_until(lambda: server.scheduler.active == 0)
        metrics = web.get("/metrics").text
        assert 'gradmap_requests_total{route="/tokenize",status="429"} 1.0' in metrics


# -- paths that are not here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "word"), [("/v1/embeddings", "embeddings")])
def test_paths_that_clients_try_say_why(web: httpx.Client, kit: Any, path: str, word: str) -> None:
    answer = web.post(path, json={"model": kit.name, "input": "a"})
    assert answer.status_code == 404 and kit.is_refusal(answer.content)
    assert word in answer.json()["error"]["message"]
