"""Writes docs/schemas/ from the dataclasses that read the files: `python docs/make_schema.py`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from gradmap_hub import reading
from gradmap_hub.comparison import COMPARE, Comparison
from gradmap_hub.config import PruneConfig
from gradmap_hub.record import FILE_NAME, RunRecord

FOLDER = Path(__file__).with_name("schemas")
FILES: dict[str, type] = {FILE_NAME: RunRecord, COMPARE: Comparison}
_NOTES = {
    FILE_NAME: "The record of a run. Further keys are ignored; whether fields agree is checked beyond this.",
    COMPARE: "What gradmap-hub reads of a Space's facts. Further keys, which the app reads, are not described here.",
}
# As `reading.Inside`: relative, with forward slashes, and no part that is empty, "." or "..".
_PATH_INSIDE = r"^(?!\.{0,2}(/|$))(?!.*/\.{0,2}(/|$))[^\\:]+$"


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file."""
    definitions: dict[str, Any] = {}
    root = _of(FILES[name], definitions)
    if name == FILE_NAME:
        # Options of a run by name; a record may lack later ones, and have others.
        _object(PruneConfig, definitions)
        del definitions[PruneConfig.__name__]["required"]
        settings = {"anyOf": [{"$ref": f"#/$defs/{PruneConfig.__name__}"}, {"type": "null"}]}
        definitions[RunRecord.__name__]["properties"]["settings"] = settings
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "description": _NOTES[name],
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def text(name: str) -> str:
    return json.dumps(schema(name), indent=1, ensure_ascii=False) + "\n"


def destination(name: str) -> Path:
    return FOLDER / name.replace(".json", ".schema.json")


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of what `reading.from_json` accepts for a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _of(arguments[0], definitions)
        for limit in arguments[1:]:
            found |= _limited(limit)
        return found
    if origin in (typing.Union, types.UnionType):
        given = next(kind for kind in arguments if kind is not type(None))
        return {"anyOf": [_of(given, definitions), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if dataclasses.is_dataclass(hint):
        return _object(hint, definitions)
    kind = origin or hint
    if kind is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions) if arguments else True}
    if kind in (list, tuple):
        return {"type": "array", "items": _of(arguments[0], definitions)}
    plain = {
        bool: {"type": "boolean"},
        str: {"type": "string"},
        int: {"type": "integer", "minimum": -reading.INTEGER_LIMIT, "maximum": reading.INTEGER_LIMIT},
        float: {"type": "number", "minimum": -reading.NUMBER_LIMIT, "maximum": reading.NUMBER_LIMIT},
    }
    return dict(plain.get(kind, {}))


def _limited(limit: Any) -> dict[str, Any]:
    match limit:
        case reading.Range():
            return {"minimum": limit.low, "maximum": limit.high}
        case reading.Length():
            return {"anyOf": [{"minItems": length, "maxItems": length} for length in limit.lengths]}
        case reading.Inside():
            return {"pattern": _PATH_INSIDE}
        case _:
            raise TypeError(f"{limit!r} has no JSON Schema; add it to docs/make_schema.py.")


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # a class may contain itself
        hints = typing.get_type_hints(kind, include_extras=True)
        needed = [
            entry.name
            for entry in dataclasses.fields(kind)
            if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        ]
        definitions[name] = {
            "description": " ".join((inspect.getdoc(kind) or "").split()),
            "type": "object",
            "properties": {entry.name: _of(hints[entry.name], definitions) for entry in dataclasses.fields(kind)},
            "required": needed,
        }
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file in FILES:
        destination(file).write_text(text(file), encoding="utf-8")
