"""Answers in JSON: of the schema that was asked for, whatever the model would rather say."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gradmap_hub.errors import MissingExtra
from gradmap_hub.runtime import Sampling, constraints

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TURNS = [{"role": "user", "content": "Which city?"}]
PROMPT = "The capital of France"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Köln"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "large": {"type": "boolean"},
    },
    "required": ["city", "size", "large"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="of the extra json")


def post(server: Any, kit: Any, route: str, **body: Any) -> httpx.Response:
    given = {"messages": TURNS} if route == CHAT else {"prompt": PROMPT}
    body = {"model": kit.name, "max_tokens": 250, "temperature": 0, **given, **body}
    return httpx.post(server.url + route, json=body, timeout=60)


def is_city(text: str) -> bool:
    found = json.loads(text)
    return (
        set(found) == {"city", "size", "large"}
        and found["city"] in ("Paris", "Köln")
        and type(found["size"]) is int
        and 0 <= found["size"] <= 99
        and type(found["large"]) is bool
    )


@library
@pytest.mark.parametrize("which", ["model", "batching"])
@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_an_answer_has_the_schema(which: str, route: str, request: pytest.FixtureRequest, kit: Any) -> None:
    model = request.getfixturevalue(which)
    ids = model.encode_chat(TURNS) if route == CHAT else model.encode(PROMPT)
    with kit.serving(model) as server:
        (choice,) = post(server, kit, route, response_format=FORMAT).json()["choices"]
        text = choice["message"]["content"] if route == CHAT else choice["text"]
        assert is_city(text) and choice["finish_reason"] == "stop"
        alone = model.start(ids, max_tokens=250, constraint=model.constrain(SCHEMA))
        assert text == "".join(alone)
        *chunks, done = kit.events(iter(post(server, kit, route, response_format=FORMAT, stream=True).text.split("\n")))
        choices = [chunk["choices"][0] for chunk in chunks]
        pieces = [each["delta"].get("content") or "" if route == CHAT else each["text"] for each in choices]
        assert done == "[DONE]" and "".join(pieces) == text and choices[-1]["finish_reason"] == "stop"


@library
def test_sampled_choices_have_it_each(model: Any, kit: Any) -> None:
    with kit.serving(model) as server:
        options = {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 1, "seed": 3}
        choices = post(server, kit, CHAT, response_format=FORMAT, n=6, **options).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(map(is_city, texts)) and len(set(texts)) > 1


@library
def test_json_objects(model: Any, kit: Any) -> None:
    """Any object; the tiny model does not close its texts, so a bias helps it."""
    closing = {str(token): 60 for token in range(model.vocabulary) if model.token_bytes(token) in (b'"', b"}")}
    with kit.serving(model) as server:
        body = {"response_format": {"type": "json_object"}, "logit_bias": closing, "presence_penalty": 2}
        (choice,) = post(server, kit, CHAT, **body).json()["choices"]
        assert isinstance(json.loads(choice["message"]["content"]), dict) and choice["finish_reason"] == "stop"
        cut = post(server, kit, CHAT, response_format={"type": "json_object"}, max_tokens=1).json()["choices"][0]
        assert cut["finish_reason"] == "length" and cut["message"]["content"].lstrip().startswith("{")


@library
def test_log_probabilities_stay_the_models(model: Any, kit: Any) -> None:
    with kit.serving(model) as server:
        (choice,) = post(server, kit, CHAT, response_format=FORMAT, logprobs=True).json()["choices"]
    ids = model.encode_chat(TURNS)
    alone = model.start(ids, max_tokens=250, constraint=model.constrain(SCHEMA))
    list(alone)
    wanted = (-model.losses([*ids, *alone.token_ids]))[len(ids) - 1 :].tolist()
    found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert found[: len(wanted)] == pytest.approx(wanted, abs=1e-4)


@library
@pytest.mark.parametrize("which", ["model", "batching"])
def test_answers_beside_it_are_those_of_a_lone_request(which: str, request: pytest.FixtureRequest, kit: Any) -> None:
    model = request.getfixturevalue(which)
    with kit.serving(model) as server, ThreadPoolExecutor(8) as pool:
        formats = [None, FORMAT] * 4
        answers = list(pool.map(lambda wanted: post(server, kit, PLAIN, response_format=wanted).json(), formats))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[::2] == [kit.alone(model, model.encode(PROMPT), 250)] * 4
    assert len(set(texts[1::2])) == 1 and is_city(texts[1])


@library
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": 5},
        {"$ref": "https://example.com/a"},
        {"type": "string", "pattern": "(?<=a)b\n"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        json.loads('{"properties": {"a": ' * 90 + "{}" + "}}" * 90),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(model: Any, kit: Any, served: Any, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = post(served, kit, CHAT, response_format=wanted)
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    error = answer.json()["error"]
    assert error["param"] == "response_format" and "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": FORMAT, "min_tokens": 2}, "min_tokens"),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_is_refused_is_named(served: Any, kit: Any, options: dict[str, Any], param: str) -> None:
    answer = post(served, kit, CHAT, **options)
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    assert answer.json()["error"]["param"] == param


def test_text_needs_no_library(served: Any, model: Any, kit: Any) -> None:
    for wanted in (None, {"type": "text"}):
        answer = post(served, kit, PLAIN, response_format=wanted, max_tokens=9).json()
        assert answer["choices"][0]["text"] == kit.alone(model, model.encode(PROMPT), 9)


def test_without_the_library_it_is_named(model: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as missing:
        constraints.Constraints(None, 400, ())  # pyright: ignore[reportArgumentType]

    class Without:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def constrain(self, schema: Any) -> Any:
            raise missing.value

    with kit.serving(Without()) as server:
        answer = post(server, kit, CHAT, response_format={"type": "json_object"})
    assert answer.status_code == 400 and "gradmap-hub[json]" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "response_format"


@library
def test_a_greedy_answer_may_end_early(model: Any) -> None:
    """The end token is allowed once the JSON is complete, and the grammar ends the answer without one."""
    answer = model.start([5], max_tokens=50, constraint=model.constrain({"enum": ["Paris"]}), sampling=Sampling())
    assert "".join(answer) == '"Paris"' and answer.finish_reason == "stop"


FORMS: list[tuple[dict[str, Any], set[str]]] = [
    ({"structured_outputs": {"regex": "(red|blue) [12]"}}, {"red 1", "red 2", "blue 1", "blue 2"}),
    ({"guided_regex": "a{3}"}, {"aaa"}),
    ({"structured_outputs": {"choice": ["yes", 'no "x"']}}, {"yes", 'no "x"'}),
    ({"guided_choice": ["only\nthis"]}, {"only\nthis"}),
    ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, {"xy"}),
    ({"guided_grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
    ({"structured_outputs": {"json": {"enum": [7]}}}, {"7"}),
    ({"guided_json": {"const": True}}, {"true"}),
]


@library
@pytest.mark.parametrize(("body", "texts"), FORMS, ids=[" ".join(body) + str(i) for i, (body, _) in enumerate(FORMS)])
def test_other_forms(served: Any, kit: Any, body: dict[str, Any], texts: set[str]) -> None:
    (chat,) = post(served, kit, CHAT, **body).json()["choices"]
    (plain,) = post(served, kit, PLAIN, **body).json()["choices"]
    assert chat["message"]["content"] in texts and plain["text"] in texts
    assert chat["finish_reason"] == plain["finish_reason"] == "stop"


@library
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a" * 5000}, "guided_regex"),
        ({"structured_outputs": {"json": "{}"}}, "structured_outputs.json"),
    ],
)
def test_a_form_that_cannot_be_is_named(served: Any, kit: Any, body: dict[str, Any], param: str) -> None:
    answer = post(served, kit, CHAT, **body)
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    assert answer.json()["error"]["param"] == param
