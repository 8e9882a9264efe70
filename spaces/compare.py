"""What was measured when the Space was made (compare.json), and the fair live comparison of two models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from generation import Generation, Model, Settings, begin

SCHEMA_VERSION = 1
# A ratio over one or two steps is mostly noise.
FEWEST_STEPS_FOR_A_RATIO = 4


class FactsError(Exception):
    """compare.json cannot be used; the message is meant for the page."""


@dataclass(frozen=True)
class Source:
    """Where one of the two models comes from."""

    name: str
    repo_id: str | None
    revision: str | None
    stored: Literal["space", "hub"]
    path: str


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
    """compare.json."""

    title: str
    runtime: Literal["onnx", "transformers"]
    precision: str
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


def _source(content: dict[str, Any], stored: Literal["space", "hub"]) -> Source:
    return Source(
        name=str(content["name"]),
        repo_id=content.get("repo_id"),
        revision=content.get("revision"),
        stored=stored,
        path=str(content.get("path") or ""),
    )


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
            original=_source(content["original"], content["original"].get("stored", "hub")),
            pruned=_source(content["pruned"], "hub"),
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
    """The two loaded models."""

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
        """How many tokens the pruned model writes while the original writes one."""
        steps = self.shared_steps
        if steps < FEWEST_STEPS_FOR_A_RATIO:
            return None
        return sum(self.original.seconds[1 : steps + 1]) / sum(self.pruned.seconds[1 : steps + 1])


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
