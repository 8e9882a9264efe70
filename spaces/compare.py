"""compare.json, and the live comparison of two models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from generation import Generation, Model, Settings, begin

SCHEMA_VERSION = 2
# A ratio over one or two steps is mostly noise.
FEWEST_STEPS_FOR_A_RATIO = 4
# Limit of any number in compare.json: beyond all counts of bytes and tokens.
LARGEST = 10**18


class FactsError(Exception):
    """compare.json is unusable; the page shows the message."""


@dataclass(frozen=True)
class Source:
    """One of the two models and its repository."""

    name: str
    repo_id: str | None
    revision: str | None


@dataclass(frozen=True)
class Cost:
    """The cost of quantization: perplexity of a file and of its source checkpoint, on the same tokens."""

    perplexity: float
    checkpoint: float
    text: str
    tokens: int


@dataclass(frozen=True)
class Stored:
    """A model's files in one precision: in the Space's own folder or in the model's repository, below `path`. `bytes`
    and `cost` are None where they are not known."""

    where: Literal["space", "hub"]
    path: str
    bytes: int | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Precision:
    """Both models in one precision. Models are compared only in the same precision. `file`: the name of the ONNX graph,
    empty if both run in transformers."""

    name: str
    file: str
    original: Stored
    pruned: Stored


@dataclass(frozen=True)
class Perplexity:
    """The perplexity on one text; None if not measured."""

    text: str
    tokens: int
    original: float | None
    pruned: float | None


@dataclass(frozen=True)
class Pair:
    """One quantity of both models."""

    original: int
    pruned: int


@dataclass(frozen=True)
class Facts:
    """The content of compare.json. `precision` names the entry of `precisions` that is loaded first."""

    title: str
    runtime: Literal["onnx", "transformers"]
    precision: str
    precisions: tuple[Precision, ...]
    original: Source
    pruned: Source
    layers: Pair
    removed: tuple[int, ...]
    parameters: Pair
    bytes: Pair
    perplexity: tuple[Perplexity, ...]
    compensated: int
    healed: int
    examples: tuple[str, ...]
    license: str | None

    def named(self, precision: str) -> Precision:
        """The precision with this name.

        Raises:
            KeyError: no precision has this name.
        """
        return {entry.name: entry for entry in self.precisions}[precision]


def _text(content: dict[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise FactsError(f"compare.json: `{key}` must be a string; got {_shown(value)}.")
    return value


def _optional(content: dict[str, Any], key: str) -> str | None:
    return None if content.get(key) is None else _text(content, key)


def _whole(content: dict[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise FactsError(f"compare.json: `{key}` must be an integer, 0 or more; got {_shown(value)}.")
    return value


def _above_0(content: dict[str, Any], key: str) -> float:
    value = content[key]
    if type(value) not in (int, float) or not 0 < value <= LARGEST:
        raise FactsError(f"compare.json: `{key}` must be a number above 0; got {_shown(value)}.")
    return float(value)


def _list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key, [])
    if not isinstance(value, list):
        raise FactsError(f"compare.json: `{key}` must be a list; got {_shown(value)}.")
    return value


def _shown(value: object) -> str:
    """A value for a message, or only its type if it is long or composite."""
    simple = isinstance(value, str | float | bool) or (type(value) is int and abs(value) <= LARGEST)
    return ascii(value) if simple and len(ascii(value)) <= 60 else f"a {type(value).__name__}"


def _source(content: dict[str, Any]) -> Source:
    return Source(_text(content, "name"), _optional(content, "repo_id"), _optional(content, "revision"))


def _stored(content: dict[str, Any]) -> Stored:
    if content["stored"] not in ("space", "hub"):
        raise FactsError(f"compare.json: `stored` must be space or hub; got {_shown(content['stored'])}.")
    cost = content.get("quality")
    path = _optional(content, "path") or ""
    if "\\" in path or path.startswith("/") or ".." in path.split("/"):
        raise FactsError(f"compare.json: `path` must stay within its folder; got {_shown(path)}.")
    return Stored(
        where=content["stored"],
        path=path,
        bytes=None if content.get("bytes") is None else _whole(content, "bytes"),
        cost=None
        if cost is None
        else Cost(
            _above_0(cost, "perplexity"),
            _above_0(cost, "checkpoint_perplexity"),
            _text(cost, "text"),
            _whole(cost, "tokens"),
        ),
    )


def _file(entry: dict[str, Any], runtime: str) -> str:
    file = _optional(entry, "file") or ""
    if runtime == "onnx" and not file:
        raise FactsError(
            f"compare.json names no file for {_text(entry, 'name')[:60]}: an earlier version of gradmap-hub wrote it. "
            "Write the Space again with `gradmap-hub space FOLDER`."
        )
    if "/" in file or "\\" in file or file.startswith("."):
        raise FactsError(f"compare.json: `file` must be a file name without a folder; got {_shown(file)}.")
    return file


def _precisions(content: dict[str, Any]) -> tuple[Precision, ...]:
    found = tuple(
        Precision(
            _text(entry, "name"), _file(entry, content["runtime"]), _stored(entry["original"]), _stored(entry["pruned"])
        )
        for entry in _list(content, "precisions")
    )
    if content["precision"] not in [entry.name for entry in found]:
        raise FactsError(
            f"compare.json starts with the precision {_shown(content['precision'])}, which it does not list."
        )
    return found


def _compensated(compensation: dict[str, Any]) -> int:
    """The number of corrected weight matrices."""
    return _whole(compensation, "matrices") if "matrices" in compensation else int(bool(compensation.get("applied")))


def _measured(row: dict[str, Any], key: str) -> float | None:
    return None if row.get(key) is None else _above_0(row, key)


def read_facts(file: Path) -> Facts:
    """Read and check compare.json.

    Raises:
        FactsError: the file is missing or invalid; the message names the key.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise FactsError(
                f"compare.json has schema version {_shown(version)}; this page reads version {SCHEMA_VERSION}."
            )
        if content["runtime"] not in ("onnx", "transformers"):
            raise FactsError(f"compare.json: `runtime` must be onnx or transformers; got {_shown(content['runtime'])}.")
        pairs = {
            key: Pair(_whole(content[key], "original"), _whole(content[key], "pruned"))
            for key in ("layers", "parameters", "bytes")
        }
        return Facts(
            title=_text(content, "title"),
            runtime=content["runtime"],
            precision=_text(content, "precision"),
            precisions=_precisions(content),
            original=_source(content["original"]),
            pruned=_source(content["pruned"]),
            layers=pairs["layers"],
            removed=tuple(_whole({"removed": index}, "removed") for index in _list(content["layers"], "removed")),
            parameters=pairs["parameters"],
            bytes=pairs["bytes"],
            perplexity=tuple(
                Perplexity(
                    text=_text(row, "text"),
                    tokens=_whole(row, "tokens"),
                    original=_measured(row, "original"),
                    pruned=_measured(row, "pruned"),
                )
                for row in _list(content, "perplexity")
            ),
            compensated=_compensated(content.get("compensation", {})),
            healed=_whole({"tokens": 0} | (content.get("healed") or {}), "tokens"),
            examples=tuple(_text({"examples": example}, "examples") for example in _list(content, "examples")),
            license=_optional(content, "license"),
        )
    except OSError as error:
        raise FactsError("compare.json is missing: it must be next to app.py.") from error
    except KeyError as error:
        advice = "Write the Space again with `gradmap-hub space FOLDER`."
        raise FactsError(f"compare.json lacks the key {error}. {advice}") from error
    except RecursionError as error:
        raise FactsError("compare.json is nested too deeply.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise FactsError(f"compare.json cannot be read: {error}") from error


@dataclass(frozen=True)
class Models:
    """The two loaded models, in the same precision."""

    original: Model
    pruned: Model


@dataclass
class Comparison:
    """Both answers to one prompt."""

    original: Generation
    pruned: Generation

    @property
    def shared_steps(self) -> int:
        """The number of decode steps that both models took; the first step is prefill and does not count."""
        return max(0, min(len(self.original.seconds), len(self.pruned.seconds)) - 1)

    @property
    def speed_ratio(self) -> float | None:
        """The decode speed of the pruned model relative to the original, as the median over the shared steps, which
        ignores outliers. None if there are too few steps."""
        steps = self.shared_steps
        if steps < FEWEST_STEPS_FOR_A_RATIO:
            return None
        pairs = zip(self.original.seconds[1 : steps + 1], self.pruned.seconds[1 : steps + 1], strict=True)
        return statistics.median(original / pruned for original, pruned in pairs)


def start_comparison(models: Models, prompt: str, settings: Settings) -> Comparison:
    return Comparison(begin(models.original, prompt, settings), begin(models.pruned, prompt, settings))


def run(comparison: Comparison, stopped: Callable[[], bool]) -> Iterator[None]:
    """Let the models take turns, one token each.

    In two threads, the models would slow each other down at random and the speed ratio would mean nothing. Taking
    turns, each step has the whole machine.
    """
    both = (comparison.original, comparison.pruned)
    while any(generation.finish_reason is None for generation in both):
        for generation in both:
            if stopped():
                for each in both:
                    each.stop()
                return
            generation.advance()
        yield
