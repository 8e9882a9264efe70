"""What a sweep measured, one JSON file (sweep.json); the table and the figure are drawn from it alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.evaluation.speed import Speed
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import (
    Base,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    HealRecord,
    from_json,
    to_json,
)

SWEEP_VERSION = 1
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepPoint:
    """One number of layers removed, as `prune` would remove and correct them.

    `ratios`: those asked for that come to it. `bytes`: the original's files; the tensors that the written checkpoint
    would hold. `perplexity`: pruned and corrected over original, over all rows of all texts, each row of the same
    weight; `interval`: its 95% bootstrap interval; `uncorrected`: the same before the correction. `speed`: None if it
    was not measured. `seconds`: of each stage, when it was computed.
    """

    ratios: list[float]
    removed: list[int]
    layers: BeforeAfter
    parameters: BeforeAfter
    bytes: BeforeAfter
    metric: str
    perplexity: float
    interval: list[float]
    uncorrected: float
    evaluation: EvaluationRecord
    candidates: list[Candidate]
    compensation: CompensationRecord
    heal: HealRecord | None = None
    speed: Speed | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the layers, that which is removed."""
        return len(self.removed) / self.layers.before

    @property
    def parameter_share(self) -> float:
        """Of the parameters, that which is removed."""
        return 1 - self.parameters.after / self.parameters.before


@dataclass(frozen=True)
class Recommendation:
    """`ratio` is None if nothing can be recommended; `reason` says why, or why this one. `knee`: the ratio of the knee,
    if there is one; `knee_reason` in words either way. `max_loss`: the bound asked for, in percent. `push`: the command
    that makes and publishes what is recommended."""

    ratio: float | None
    reason: str
    knee: float | None
    knee_reason: str
    max_loss: float | None = None
    push: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """`ratios`: all that were asked for; `points` those that are measured, fewest layers removed first. `settings`: the
    fields of PruneConfig. `seconds`: of the stages that all ratios share. `no_speed`: why speed was not measured."""

    schema_version: int
    gradmap_hub: str
    command: str
    base: Base
    ratios: list[float]
    settings: dict[str, Any]
    calibration: CalibrationRecord
    points: list[SweepPoint]
    recommendation: Recommendation
    no_speed: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def missing(self) -> list[float]:
        """Ratios asked for that are not measured yet."""
        return sorted(set(self.ratios) - {ratio for point in self.points for ratio in point.ratios})

    def write(self, folder: Path) -> None:
        (folder / SWEEP_FILE).write_text(to_json(self) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> SweepRecord:
        """Read `folder`/sweep.json.

        Raises:
            SourceError: there is none, or it is not one.
        """
        path = folder / SWEEP_FILE
        try:
            return from_json(SweepRecord, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SourceError(
                f"{folder} has no {SWEEP_FILE}.", hint="Make it with `gradmap-hub sweep MODEL`."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{path} cannot be read as a sweep of gradmap-hub: {error}") from error
