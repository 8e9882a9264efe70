"""How the families write calls of tools: found from the template, written by a grammar, read back in pieces."""

from __future__ import annotations

import importlib.util
import json
import random
from typing import Any

import pytest

from gradmap_hub import runtime
from gradmap_hub.runtime.constraints import Calls, ConstraintError, Grammar, Regex
from gradmap_hub.runtime.tool_calls import CallParser
from gradmap_hub.runtime.tool_formats import FORMATS, ToolFormat, format_of, tool_template_of

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"city": "Köln", "days": 3}),
    ("add", {"a": {"b": ["}", "{", '"']}}),
    ("get_weather", {}),
]
KNOWN = {"get_weather", "add"}
library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="of the extra json")


def written(row: ToolFormat) -> str:
    each = [
        row.call.replace("NAME", name).replace("ARGUMENTS", json.dumps(given, ensure_ascii=False))
        for name, given in CALLS
    ]
    return row.before + row.between.join(each) + row.after


def read(row: ToolFormat, text: str, draw: random.Random | None, **options: Any) -> tuple[str, list[Any]]:
    """The text and the calls that a parser finds; `draw`: in pieces."""
    parser = CallParser(row, KNOWN, **options)
    said, found = "", []
    while text:
        size = len(text) if draw is None else draw.randint(1, 7)
        more, calls = parser.add(text[:size])
        said, text = said + more, text[size:]
        found += [(call.name, json.loads(call.arguments)) for call in calls]
    assert parser.calls == len(found)
    return said + parser.rest(), found


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_calls_are_read_back(row: ToolFormat) -> None:
    draw = random.Random(1)
    for trial in range(40):
        chance = draw if trial else None
        assert read(row, written(row), chance) == ("", CALLS)
        assert read(row, written(row), chance, parallel=False) == ("", CALLS[:1])
        if row.marks:
            mark = row.marks[0] if row.bare else ""
            assert read(row, f"Let me look.\n{mark}{written(row)}", chance) == ("Let me look.", CALLS)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_what_is_no_call_stays_text(row: ToolFormat) -> None:
    draw = random.Random(2)
    unknown = written(row).replace("get_weather", "other").replace("add", "sub")
    for text in (
        "plain", "plain {} text", "<tool_cal is no mark", "a [TOOL_CALL", unknown, written(row)[: len(row.before) + 20],
        row.before + "nothing", '{"a": 1}', "{" * 50, "[1, 2]",
    ):  # fmt: skip
        for trial in range(20):
            said, found = read(row, text, draw if trial else None)
            assert not found and "".join(said.split()) == "".join(text.split())


def test_other_writings_of_a_call() -> None:
    hermes = next(row for row in FORMATS if row.name == "hermes")
    wanted = [("add", {"a": 1})]
    for call in (
        '<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>',
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}</tool_call>',
    ):
        assert read(hermes, call, None) == ("", wanted)
    assert read(hermes, '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\nDone.', None) == (
        "Done.", wanted
    )  # fmt: skip
    assert read(hermes, '<tool_call>{"name": "add", "arguments": null}</tool_call>', None) == ("", [("add", {})])
    for broken in ('{"name": "add", "arguments": [1]}', '{"name": "add"}', '{"name": 5, "arguments": {}}'):
        assert read(hermes, f"<tool_call>{broken}</tool_call>", None)[1] == []


@pytest.mark.parametrize(
    ("template", "special", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", (), "hermes"),
        ("{{ tools }}[TOOL_CALLS]", (), "mistral"),
        ("{{ tools }}[TOOL_CALLS] [ARGS]", (), "mistral-v11"),
        ("{{ tools }}", ("<|python_tag|>",), "llama3"),
        ("{{ tools }} <|tool_call|>", (), "granite"),
        ("{{ tools }} <|tool|>", ("<|tool_call|>", "<|/tool_call|>"), "phi4"),
        ("{{ tools }}", (), "json"),
        ("{{ tools }} <function=", (), None),
        ("{{ messages }} tool_call", ("<tool_call>",), None),
        ("", ("<tool_call>",), None),
    ],
)
def test_the_template_shows_the_format(template: str, special: tuple[str, ...], name: str | None) -> None:
    row = format_of(template, special)
    assert (row and row.name) == name


def test_a_template_of_its_own_for_tools() -> None:
    assert tool_template_of("a", {}) == tool_template_of("a", {"chat_template": "b"}) == "a"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert tool_template_of("a", {"chat_template": named}) == "b"
    assert tool_template_of("a", {"chat_template": {"tool_use": "b"}}) == "b"
    assert tool_template_of("a", {"chat_template": {"tool_use": 5}}) == "a"


@pytest.fixture(scope="module")
def model(published: Any) -> Any:
    return runtime.load(published, threads=1)


CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
    "additionalProperties": False, "$defs": {"City": {"enum": ["Paris", "Köln"]}},
}  # fmt: skip
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@library
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_a_grammar_writes_calls(model: Any, row: ToolFormat) -> None:
    """Whatever the model would rather write; of $defs too, which are relative to the parameters of one function."""
    for seed in range(3):
        parallel = seed == 0
        constraint = model.constrain(Calls(row, {"get_weather": CITY, "add": NOTHING}, parallel))
        sampling = runtime.Sampling(temperature=1.5, seed=seed)
        answer = model.start([5], max_tokens=400, constraint=constraint, sampling=sampling)
        text = "".join(answer)
        said, found = read(row, text, None)
        assert found and all(given == ({} if name == "add" else {"city": given.get("city")}) for name, given in found)
        assert all(name == "add" or given["city"] in ("Paris", "Köln") for name, given in found)
        assert parallel or (answer.finish_reason == "stop" and not said and len(found) == 1)
        assert len(found) <= 8


@library
def test_one_call_or_an_answer(model: Any) -> None:
    row = next(row for row in FORMATS if row.name == "hermes")
    names = set()
    for seed in range(12):
        wanted = Calls(row, {"get_weather": CITY}, parallel=False, answer={"enum": ["no"]})
        sampling = runtime.Sampling(temperature=2.0, seed=seed)
        answer = model.start([5], max_tokens=300, constraint=model.constrain(wanted), sampling=sampling)
        said, found = read(row, "".join(answer), None)
        assert (said, len(found)) in (('"no"', 0), ("", 1))
        names.add(said)
    assert names == {'"no"', ""}
    broken = {"f": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}
    with pytest.raises(ConstraintError, match="parameters of a function"):
        model.constrain(Calls(row, broken))


@library
def test_special_tokens_are_written_and_shown(model: Any) -> None:
    """A mark that is a special token, which answers leave out otherwise."""
    mark = model.decode([min(model.end_ids)])
    assert model.is_special(min(model.end_ids)) and mark.startswith("<")
    row = ToolFormat("test", (), f"{mark}[", '{"name": "NAME", "arguments": ARGUMENTS}', ",", "]", (mark,))
    shown = {min(model.end_ids): mark}
    for texts in (shown, None):
        constraint = model.constrain(Calls(row, {"add": NOTHING}, parallel=False))
        answer = model.start([5], max_tokens=300, constraint=constraint, shown=texts, ignore_end=True)
        text = "".join("".join(answer).split())
        assert text == ((mark if texts else "") + '[{"name":"add","arguments":{}}]')
        assert answer.token_ids[0] == min(model.end_ids)


@library
def test_patterns_and_grammars(model: Any) -> None:
    for wanted, texts in (
        (Regex(r"(red|blue) [0-9]{2}"), {f"{word} {number:02}" for word in ("red", "blue") for number in range(100)}),
        (Grammar('start: "yes" | "no"'), {"yes", "no"}),
        (Grammar('root ::= "yes" | "no"'), {"yes", "no"}),
    ):
        answer = model.start([5], max_tokens=30, constraint=model.constrain(wanted))
        assert "".join(answer) in texts and answer.finish_reason == "stop"
    for wanted in (Regex("("), Grammar("start: nothing"), Grammar("::= ("), Grammar("")):
        with pytest.raises(ConstraintError, match="cannot be used"):
            model.constrain(wanted)
