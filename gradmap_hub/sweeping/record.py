"""The results of a sweep, stored as sweep.json; table and figure are made from it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.evaluation.speed import Speed
from gradmap_hub.files import read_json, write_text
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.reading import from_json
from gradmap_hub.record import (
    Base,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    HealRecord,
    to_json,
)

SWEEP_VERSION = 1
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepPoint:
    """The result of removing one number of layers, with the same compensation and healing as `prune`.

    Attributes:
        ratios: The requested ratios that remove this number of layers.
        removed: Original indices of the removed layers.
        bytes: Size of the original's weight files, and of the tensors that a written checkpoint would contain.
        metric: Name of the ranking that proposed the layers.
        perplexity: That of the result divided by the original's, over all sequences of all texts with equal weight.
        interval: 95% bootstrap interval of `perplexity`.
        uncorrected: `perplexity` without compensation.
        speed: None if not measured.
        seconds: Duration of each stage, when it was computed.
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
        """Share of the layers that is removed."""
        return len(self.removed) / self.layers.before

    @property
    def parameter_share(self) -> float:
        """Share of the parameters that is removed."""
        return 1 - self.parameters.after / self.parameters.before


@dataclass(frozen=True)
class Recommendation:
    """The recommended ratio, or None, and the reason.

    `knee`: the ratio of the knee, or None; `knee_reason`: the explanation. `max_loss`: the requested bound in percent.
    `push`: the command that publishes a model with the recommended ratio.
    """

    ratio: float | None
    reason: str
    knee: float | None
    knee_reason: str
    max_loss: float | None = None
    push: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep. `ratios`: all requested ones; `points`: the measured ones, in ascending order of the layers removed;
    `settings`: the fields of PruneConfig; `seconds`: of the shared stages; `no_speed`: why speed was not measured."""

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
        """Requested ratios that are not measured yet."""
        return sorted(set(self.ratios) - {ratio for point in self.points for ratio in point.ratios})

    def write(self, folder: Path) -> None:
        write_text(folder / SWEEP_FILE, to_json(self) + "\n")

    @staticmethod
    def read(folder: Path) -> SweepRecord:
        """Read `folder`/sweep.json.

        Raises:
            SourceError: the file is missing or invalid.
        """
        path = folder / SWEEP_FILE
        try:
            return from_json(SweepRecord, read_json(path, finite=True))
        except FileNotFoundError:
            raise SourceError(
                f"{folder} has no {SWEEP_FILE}.", hint="Create it with `gradmap-hub sweep MODEL`."
            ) from None
        except (ValueError, OSError) as error:
            raise SourceError(f"{path} is not a valid sweep of gradmap-hub: {error}.") from error
