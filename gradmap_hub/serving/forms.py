"""Constraints on the answer in a request: a JSON schema, a regular expression, a choice of strings or a grammar."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from gradmap_hub.runtime.constraints import Grammar, Regex, Wanted
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.settings import MAX_CHOICES_OF_TEXT, MAX_GRAMMAR, MAX_PATTERN
from gradmap_hub.serving.tools import Strict

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
_Text = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
Texts = Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES_OF_TEXT)]


class NamedSchema(Strict):
    """A JSON schema. Answers follow it whether or not `strict` is set."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer: any text, a JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None: it may be any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class StructuredOutputs(Strict):
    """At most one of these constraints, as in vLLM. `grammar`: llguidance's variant of Lark, or llama.cpp's GBNF."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Texts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class Formed(Protocol):
    """The fields of a request that constrain the answer."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> dict[str, Any] | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...


def form_of(asked: Formed) -> tuple[str, Wanted | None]:
    """Return the name of the parameter that constrains the answer, and the constraint; None: it may be any text.

    Raises:
        ApiError: 400, several parameters constrain the answer, or response_format lacks its json_schema.
    """
    found: dict[str, Wanted] = {}
    if asked.response_format is not None:
        _check_format(asked.response_format)
        if (schema := asked.response_format.schema_of_answer) is not None:
            found["response_format"] = schema
    given = asked.structured_outputs or StructuredOutputs()
    outputs = {"json": given.json_, "regex": given.regex, "choice": given.choice, "grammar": given.grammar}
    outputs |= {"json_object": {"type": "object"} if given.json_object else None}
    every = {f"structured_outputs.{name}": value for name, value in outputs.items()}
    every |= {"guided_json": asked.guided_json, "guided_regex": asked.guided_regex}
    every |= {"guided_choice": asked.guided_choice, "guided_grammar": asked.guided_grammar}
    for param, value in every.items():
        if value is not None:
            found[param] = _wanted(param, value)
    if len(found) > 1:
        first, second, *_ = found
        said = f"{first} and {second} exclude each other: both constrain the answer."
        raise ApiError(400, said, param=second, code="invalid_value")
    return next(iter(found.items()), ("response_format", None))


def _wanted(param: str, value: Any) -> Wanted:
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return Grammar("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value))
    return Regex(value) if param.endswith("regex") else Grammar(value)


def _check_format(wanted: ResponseFormat) -> None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        said = "response_format must have a json_schema if its type is json_schema, and only then."
        raise ApiError(400, said, param="response_format.json_schema", code="invalid_value")
