"""What was measured when the Space was made (compare.json), and the fair live comparison of two models."""

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
    """compare.json cannot be used; the message is meant for the page."""


@dataclass(frozen=True)
class Source:
    """One of the two models, and the repository that it comes from."""

    name: str
    repo_id: str | None
    revision: str | None


@dataclass(frozen=True)
class Cost:
    """What fewer bits cost: the perplexity of a file and of the checkpoint it was made from, on the same tokens."""

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
    """Both models in the same precision, the only way they are ever compared."""

    name: str
    original: Stored
    pruned: Stored


@dataclass(frozen=True)
class Perplexity:
    """The perplexity on one text; a model that was not measured has none."""

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
    """compare.json. `precision` is the one that is loaded first, the name of one of `precisions`."""

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
    examples: tuple[str, ...]
    license: str | None

    def named(self, precision: str) -> Precision:
        """Raises KeyError: there is none of that name."""
        return {entry.name: entry for entry in self.precisions}[precision]


def _source(content: dict[str, Any]) -> Source:
    return Source(str(content["name"]), content.get("repo_id"), content.get("revision"))


def _stored(content: dict[str, Any]) -> Stored:
    if content["stored"] not in ("space", "hub"):
        raise FactsError(f"compare.json stores a model in a place that is not known: {content['stored']!r}.")
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


def _precisions(content: dict[str, Any]) -> tuple[Precision, ...]:
    found = tuple(
        Precision(str(entry["name"]), _stored(entry["original"]), _stored(entry["pruned"]))
        for entry in content["precisions"]
    )
    if content["precision"] not in [entry.name for entry in found]:
        raise FactsError(f"compare.json begins with the precision {content['precision']!r}, which it does not list.")
    return found


def _corrected(compensation: dict[str, Any]) -> int:
    """How many weight matrices were corrected."""
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
            raise FactsError(f"compare.json names a runtime that is not known: {content['runtime']!r}.")
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
            compensated=_corrected(content.get("compensation", {})),
            examples=tuple(str(example) for example in content.get("examples", [])),
            license=content.get("license"),
        )
    except OSError as error:
        raise FactsError("compare.json is missing beside app.py.") from error
    except KeyError as error:
        raise FactsError(f"compare.json lacks the key {error}.") from error
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
        """The steps both models took, without the first one, which reads the prompt."""
        return max(0, min(len(self.original.seconds), len(self.pruned.seconds)) - 1)

    @property
    def speed_ratio(self) -> float | None:
        """How many tokens the pruned model writes while the original writes one: the median over the shared steps, as
        one step that the machine took for something else must not decide."""
        steps = self.shared_steps
        if steps < FEWEST_STEPS_FOR_A_RATIO:
            return None
        pairs = zip(self.original.seconds[1 : steps + 1], self.pruned.seconds[1 : steps + 1], strict=True)
        return statistics.median(original / pruned for original, pruned in pairs)


def start_comparison(models: Models, prompt: str, settings: Settings) -> Comparison:
    return Comparison(begin(models.original, prompt, settings), begin(models.pruned, prompt, settings))


def run(comparison: Comparison, stopped: Callable[[], bool]) -> Iterator[None]:
    """Let the models write in turn, one token each.

    In turn, not in two threads: side by side on two processors they slow each other down by chance, and
    the ratio of two such runs means nothing. Taking turns, each step has the machine to itself.
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
