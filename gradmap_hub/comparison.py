"""Reads compare.json, which tells a Space what it compares. Only the fields that this package needs; the Space's app
reads the whole file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.files import parse_json, read_json
from gradmap_hub.reading import from_json

COMPARE = "compare.json"


@dataclass(frozen=True)
class ComparedModel:
    """One of the two models. `repo_id` and `revision` are None if it is local."""

    name: str = ""
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Place:
    """Where the files of a model are: "space", in the Space, or "hub", in the model's own repository."""

    stored: str


@dataclass(frozen=True)
class ComparedPrecision:
    """A precision in which the Space runs both models. `file`: name of the ONNX graph; None if the Space runs
    transformers, and in Spaces of early versions."""

    name: str
    original: Place
    file: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The fields of compare.json that this package reads."""

    original: ComparedModel
    pruned: ComparedModel
    runtime: str = "onnx"
    precisions: list[ComparedPrecision] = field(default_factory=list)


def read_comparison(folder: Path) -> Comparison:
    """Read the compare.json of a Space folder.

    Raises:
        SourceError: the file is missing or invalid; the error names the field.
    """
    return from_json(Comparison, raw_comparison(folder))


def raw_comparison(folder: Path) -> dict[str, Any]:
    """The whole content of the compare.json of a Space folder, with the fields of `Comparison` checked.

    Raises:
        SourceError: the file is missing or invalid; the error names the field.
    """
    path = folder / COMPARE
    try:
        content = read_json(path, finite=True)
        from_json(Comparison, content)
    except (OSError, ValueError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else error
        raise SourceError(
            f"{path} cannot be read: {reason}.", hint="Write the Space folder again with `gradmap-hub space FOLDER`."
        ) from error
    return content


def parse_comparison(content: bytes) -> Comparison | None:
    """Parse the content of a compare.json; None if it is invalid."""
    try:
        return from_json(Comparison, parse_json(content, finite=True))
    except ValueError:
        return None
