"""The tools of a request, and which of them the model may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from gradmap_hub.runtime.constraints import Calls
from gradmap_hub.runtime.tool_calls import CallParser
from gradmap_hub.runtime.tool_formats import ToolFormat
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.settings import MAX_TOOLS

_LARGEST = 2**53 - 1  # largest integer that every JSON parser reads exactly
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}}


class Strict(BaseModel):
    """A part of a request. A number in quotes is an error; fields that are not declared are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


# The grammar of a call and the prompt contain the name unescaped.
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """A function that the model may call. `parameters`: a JSON schema of its arguments, an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """What the chat template shows to the model."""
        described = {} if self.function.description is None else {"description": self.function.description}
        parameters = dict(self.function.parameters or _NOTHING)
        return {"type": "function", "function": {"name": self.function.name, **described, "parameters": parameters}}


class ChosenFunction(Strict):
    name: FunctionName


class NamedChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


def _kind_of_choice(value: Any) -> str:
    return "~word" if isinstance(value, str) else "~named"


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~word")] | Annotated[NamedChoice, Tag("~named")],
    Discriminator(_kind_of_choice),
]


def must_call(choice: str | NamedChoice | None) -> bool:
    """Whether every answer must have a call."""
    return choice == "required" or isinstance(choice, NamedChoice)


def check_choice(tools: Sequence[Tool], choice: str | NamedChoice | None) -> None:
    """Check that tools and tool_choice are consistent.

    Raises:
        ApiError: 400, two functions have the same name, or tool_choice demands a function that tools lacks.
    """
    names = [tool.function.name for tool in tools]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ApiError(400, f"tools: two functions have the name {double}.", param="tools", code="invalid_value")
    if must_call(choice) and not tools:
        raise ApiError(400, "tool_choice needs tools.", param="tool_choice", code="invalid_value")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        said = f"tool_choice: there is no function {choice.function.name} in tools."
        raise ApiError(400, said, param="tool_choice", code="invalid_value")


def _tight(schema: Mapping[str, Any], *, top: bool = True) -> dict[str, Any]:
    """Return a schema that excludes what a small model would continue for ever: arguments that the function does not
    have, and integers of more digits than JSON parsers read exactly."""
    found = dict(schema)
    if top and "properties" in found and not found.keys() & {"patternProperties", "unevaluatedProperties"}:
        found.setdefault("additionalProperties", False)
    if found.get("type") == "integer" and not found.keys() & _BOUNDS:
        found |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    for key in ("properties", "$defs", "definitions"):
        if isinstance(inner := found.get(key), dict):
            found[key] = {
                name: _tight(each, top=False) if isinstance(each, dict) else each for name, each in inner.items()
            }
    if isinstance(items := found.get("items"), dict):
        found["items"] = _tight(items, top=False)
    return found


@dataclass(frozen=True)
class ToolUse:
    """How the answers to a request call tools.

    `row`: how the model writes calls; `must`: whether an answer must have a call; `named`: the only function that may
    be called, if the request names one; `parallel`: whether several calls are allowed.
    """

    row: ToolFormat
    tools: Sequence[Tool]
    must: bool
    named: str | None
    parallel: bool

    @classmethod
    def of(
        cls, row: ToolFormat | None, tools: Sequence[Tool], choice: str | NamedChoice | None, parallel: bool | None
    ) -> ToolUse | None:
        """Return the use of tools that a request asks for; None: no tool may be called.

        Raises:
            ApiError: 400, the model does not support tools.
        """
        if not tools or choice == "none":
            return None
        if row is None:
            said = "The model's chat template does not support tools, or its format of calls is not supported."
            raise ApiError(400, said, param="tools", code="unsupported_parameter")
        named = choice.function.name if isinstance(choice, NamedChoice) else None
        return cls(row, tools, must_call(choice), named, parallel is not False)

    def parser(self) -> CallParser:
        """Return a parser of one answer."""
        return CallParser(self.row, {tool.function.name for tool in self.tools}, parallel=self.parallel)

    def calls(self, answer: Mapping[str, Any] | None) -> Calls | None:
        """Return the constraint of the answer; None if it may be any text. `answer`: the JSON schema of an
        answer without calls."""
        if not self.must and answer is None:
            return None
        functions = [tool.function for tool in self.tools if self.named in (None, tool.function.name)]
        chosen = {each.name: _tight(each.parameters or _NOTHING) for each in functions}
        parallel = self.parallel and self.named is None
        return Calls(self.row, chosen, parallel, None if self.must else answer)
