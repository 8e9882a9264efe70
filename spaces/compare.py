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


def _source(content: dict[str, Any]) -> Source:
    return Source(str(content["name"]), content.get("repo_id"), content.get("revision"))


def _stored(content: dict[str, Any]) -> Stored:
    if content["stored"] not in ("space", "hub"):
        raise FactsError(f"compare.json has an unknown value of `stored`: {content['stored']!r}.")
    size, cost = content.get("bytes"), content.get("quality")
    return Stored(
        where=content["stored"],
        path=str(content.get("path") or ""),
        bytes=None if size is None else int(size),
        cost=None
        if cost is None
        else Cost(
            float(cost["perplexity"]), float(cost["checkpoint_perplexity"]), str(cost["text"]), int(cost["tokens"])
        ),
    )


def _file(entry: dict[str, Any], runtime: str) -> str:
    file = str(entry.get("file") or "")
    if runtime == "onnx" and not file:
        raise FactsError(
            f"compare.json names no file for {entry['name']}: an earlier version of gradmap-hub wrote it. "
            "Write the Space again with `gradmap-hub space FOLDER`."
        )
    if "/" in file or "\\" in file or file.startswith("."):
        raise FactsError(f"compare.json names a file in another folder: {file!r}.")
    return file


def _precisions(content: dict[str, Any]) -> tuple[Precision, ...]:
    found = tuple(
        Precision(
            str(entry["name"]), _file(entry, content["runtime"]), _stored(entry["original"]), _stored(entry["pruned"])
        )
        for entry in content["precisions"]
    )
    if content["precision"] not in [entry.name for entry in found]:
        raise FactsError(f"compare.json starts with the precision {content['precision']!r}, which it does not list.")
    return found


def _compensated(compensation: dict[str, Any]) -> int:
    """The number of corrected weight matrices."""
    return int(compensation.get("matrices", bool(compensation.get("applied"))))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def read_facts(file: Path) -> Facts:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise FactsError(f"compare.json has schema version {version}; this page reads version {SCHEMA_VERSION}.")
        if content["runtime"] not in ("onnx", "transformers"):
            raise FactsError(f"compare.json has an unknown value of `runtime`: {content['runtime']!r}.")
        pairs = {
            key: Pair(int(content[key]["original"]), int(content[key]["pruned"]))
            for key in ("layers", "parameters", "bytes")
        }
        return Facts(
            title=str(content["title"]),
            runtime=content["runtime"],
            precision=str(content["precision"]),
            precisions=_precisions(content),
            original=_source(content["original"]),
            pruned=_source(content["pruned"]),
            layers=pairs["layers"],
            removed=tuple(int(index) for index in content["layers"].get("removed", [])),
            parameters=pairs["parameters"],
            bytes=pairs["bytes"],
            perplexity=tuple(
                Perplexity(
                    text=str(row["text"]),
                    tokens=int(row["tokens"]),
                    original=_number(row.get("original")),
                    pruned=_number(row.get("pruned")),
                )
                for row in content.get("perplexity", [])
            ),
            compensated=_compensated(content.get("compensation", {})),
            healed=int((content.get("healed") or {}).get("tokens", 0)),
            examples=tuple(str(example) for example in content.get("examples", [])),
            license=content.get("license"),
        )
    except OSError as error:
        raise FactsError("compare.json is missing: it must be next to app.py.") from error
    except KeyError as error:
        advice = "Write the Space again with `gradmap-hub space FOLDER`."
        raise FactsError(f"compare.json lacks the key {error}. {advice}") from error
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
