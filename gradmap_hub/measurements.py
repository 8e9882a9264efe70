"""What `evaluate` measured: the part of gradmap.json that describes a finished folder and its original."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BeforeAfter:
    before: int
    after: int


@dataclass(frozen=True)
class Contamination:
    """Rows of an evaluation text that share 13 lower-cased words in a row with a calibration row. `rows`: how many of
    `of`; None: not checked, `reason` says why. `texts`: the calibration texts they were found in."""

    rows: int | None
    of: int
    reason: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        return None if self.rows is None else self.rows / self.of


@dataclass(frozen=True)
class MeasuredText:
    """Both models on the same rows of one text. Perplexity as in `TextPerplexity`; `agreement`: share of positions
    where both find the same token likeliest; `divergence`: mean KL(original || pruned), nats per token. Each interval
    is the 95% bootstrap interval over rows, that of perplexity of the ratio pruned / original."""

    name: str
    sha256: str
    rows: int
    tokens: int
    sequence_length: int
    original: float
    pruned: float
    interval: list[float]
    agreement: float
    agreement_interval: list[float]
    divergence: float
    divergence_interval: list[float]
    contamination: Contamination | None = None


@dataclass(frozen=True)
class MeasuredMetric:
    """One metric of one task. `interval`: 95% bootstrap interval over documents of pruned - original, empty for
    metrics that are no mean over documents. `retention`: 100 pruned / original, None where that says nothing."""

    name: str
    original: float
    pruned: float
    interval: list[float] = field(default_factory=list)
    retention: float | None = None


@dataclass(frozen=True)
class MeasuredTask:
    """Both models on the same documents of one task of lm-evaluation-harness, zero-shot. `sha256`: of the documents,
    prompts and targets in order; `dataset` and `config`: where the harness has it from; `source`: where these
    documents came from; `documents` of `total`: fewer where there was a limit. `main`: the metric to look at."""

    name: str
    version: str
    dataset: str
    config: str | None
    split: str
    source: str
    documents: int
    total: int
    sha256: str
    main: str
    metrics: list[MeasuredMetric]

    @property
    def main_metric(self) -> MeasuredMetric:
        return next(metric for metric in self.metrics if metric.name == self.main)


@dataclass(frozen=True)
class FilePerplexity:
    """Of an ONNX file on one text, on the rows of the `MeasuredText` of that name; `interval`: of the ratio to the
    checkpoint's."""

    text: str
    perplexity: float
    interval: list[float]


@dataclass(frozen=True)
class MeasuredFile:
    """An ONNX file on ONNX Runtime. `sha256`: of the graph; `data_sha256`: of the weights beside it, if there are."""

    path: str
    bytes: int
    sha256: str
    data_sha256: str
    perplexity: list[FilePerplexity]


@dataclass(frozen=True)
class Rate:
    """Tokens per second: median of the rounds and its 95% bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class MeasuredSpeed:
    """`model`: original or pruned; `backend`: "PyTorch" or the path of an ONNX file. `memory`: peak resident bytes of a
    process with this backend alone; None where it was not measured (on a GPU, or where the system does not tell)."""

    model: str
    backend: str
    batch: int
    prefill: Rate
    decode: Rate
    memory: int | None = None


@dataclass(frozen=True)
class Sample:
    """What both models write after a prompt, greedily."""

    prompt: str
    original: str
    pruned: str


@dataclass(frozen=True)
class Measured:
    """What `evaluate` found. It holds for the weights whose sum is `weights_sha256` (see `source.weights_sha256`) and
    for ONNX files of the sums in `files`; `freshness` drops it where the folder holds others. `original`: what it was
    compared with, `original_commit` on the Hub or `original_sha256` of its weights."""

    gradmap_hub: str
    weights_sha256: str
    original: str
    original_commit: str | None
    original_sha256: str
    bytes: BeforeAfter
    precision: str
    texts: list[MeasuredText]
    tasks: list[MeasuredTask] = field(default_factory=list)
    files: list[MeasuredFile] = field(default_factory=list)
    speed: list[MeasuredSpeed] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    harness: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
