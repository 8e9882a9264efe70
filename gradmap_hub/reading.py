"""Decoded JSON as a dataclass: every type and range is checked, and an error names the field.

The dataclass is the schema. A field may narrow its type with `Annotated` and one of the limits here; the method
`problems` of a class, if any, then yields the fields that contradict each other. The JSON comes from
`files.read_json`, which checks its size, its depth and its strings.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

# Beyond any count of bytes or tokens; larger ones have thousands of digits.
INTEGER_LIMIT = 1 << 63
# Beyond any score or perplexity; quotients and squares of two stay finite.
NUMBER_LIMIT = 1e100


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`. `words`: the expected value, in an error."""

    low: float
    high: float
    words: str

    def accepts(self, value: Any) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Inside:
    """The path of a file inside a folder, with forward slashes."""

    words: str = "a path inside the folder"

    def accepts(self, value: str) -> bool:
        parts = value.split("/")
        return value.isprintable() and not {"", ".", ".."} & set(parts) and not {"\\", ":"} & set(value)


@dataclass(frozen=True)
class Length:
    """A list with one of these lengths."""

    lengths: tuple[int, ...]
    words: str

    def accepts(self, value: Sequence[Any]) -> bool:
        return len(value) in self.lengths


Count = Annotated[int, Range(0, INTEGER_LIMIT, "an integer, 0 or more,")]
# A divisor.
Some = Annotated[int, Range(1, INTEGER_LIMIT, "an integer, 1 or more,")]
# A divisor, or the argument of a logarithm.
Positive = Annotated[float, Range(1 / NUMBER_LIMIT, NUMBER_LIMIT, "a number above 0")]
NotNegative = Annotated[float, Range(0, NUMBER_LIMIT, "a number, 0 or more,")]
PathInside = Annotated[str, Inside()]
Interval = Annotated[list[float], Length((2,), "a list of two numbers")]
OptionalInterval = Annotated[list[float], Length((0, 2), "a list of two numbers, or an empty one")]


class FieldError(ValueError):
    """A missing or invalid field. The message names field, value and expected type; the file name precedes it."""

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(f"{where or 'its content'} is {found}; {expected} is expected")


def from_json(kind: type[T], data: Any) -> T:
    """A (nested) dataclass from decoded JSON; unknown keys, such as those of newer versions, are ignored.

    Raises:
        ValueError: a field is missing, of another type or out of range, or fields contradict each other.
    """
    return _object(kind, data, "")


def check_fields(kind: Any, data: Mapping[str, Any], where: str) -> None:
    """Check the values in `data` that are fields of the dataclass `kind`; other and missing keys are ignored. `where`:
    the path of the object, for errors.

    Raises:
        ValueError: a value is of another type or out of range.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, value in data.items():
        if name in hints:
            _decode(hints[name], value, f"{where}.{name}")


def _object(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise FieldError(where, found(data), "an object")
    hints = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        inner = f"{where}.{entry.name}" if where else entry.name
        if entry.name in data:
            values[entry.name] = _decode(hints[entry.name], data[entry.name], inner)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise FieldError(inner, "missing", _expected(hints[entry.name]))
    made = kind(**values)
    for name, reason in getattr(made, "problems", lambda: ())():
        raise ValueError(f"{where}.{name} {reason}" if where else f"{name} {reason}")
    return made


def _decode(hint: Any, value: Any, where: str, expected: str | None = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        decoded = _decode(arguments[0], value, where, arguments[1].words)
        for limit in arguments[1:]:
            if not limit.accepts(decoded):
                raise FieldError(where, found(value), limit.words)
        return decoded
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(kind for kind in arguments if kind is not type(None)), value, where)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise FieldError(where, found(value), f"one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, where)
    kind = origin or hint
    if not _fits(kind, value):
        raise FieldError(where, found(value), expected or _expected(hint))
    if kind is dict:
        return {name: _decode(arguments[1], item, f"{where}.{name[:40]}") for name, item in value.items()}
    if kind in (list, tuple):
        items = (_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        return kind(items)
    return value


def _fits(kind: Any, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return type(value) is int and abs(value) <= INTEGER_LIMIT
    if kind is float:
        return type(value) in (int, float) and abs(value) <= NUMBER_LIMIT  # no NaN either
    if kind is str:
        return isinstance(value, str)
    if kind is dict:
        return isinstance(value, dict)
    return isinstance(value, list) if kind in (list, tuple) else True


def found(value: Any) -> str:
    """A decoded value for an error message: short, printable, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of length {len(value):,}"
    if isinstance(value, str):
        return ascii(value[:40]) if not value.isprintable() else repr(value[:40])
    if isinstance(value, int) and abs(value) > INTEGER_LIMIT:
        return f"a number of {math.log10(abs(value)):.0f} digits"
    return repr(value)


_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}


def _expected(hint: Any) -> str:
    """The expected type in an error message, such as "a string"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(arguments[1].words)
    if origin in (typing.Union, types.UnionType):
        return _expected(next(kind for kind in arguments if kind is not type(None)))
    if dataclasses.is_dataclass(hint):
        return "an object"
    return _WORDS.get(origin or hint, "a list" if (origin or hint) in (list, tuple) else "a value")
