"""The results of `evaluate`: the part of gradmap.json that compares a model folder with its original."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BeforeAfter:
    before: int
    after: int


@dataclass(frozen=True)
class Contamination:
    """Sequences of an evaluation text with a 13-gram overlap (lower-cased words) with a calibration sequence. `rows`:
    how many of `of`; None: not checked, for this `reason`. `texts`: the calibration texts with the overlap."""

    rows: int | None
    of: int
    reason: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        return None if self.rows is None else self.rows / self.of


@dataclass(frozen=True)
class MeasuredText:
    """Both models on the same sequences of one text. Perplexity as in `TextPerplexity`; `agreement`: share of positions
    with the same top-1 token; `divergence`: mean KL(original || pruned), nats per token. Intervals are 95% bootstrap
    intervals over sequences; that of perplexity is for the ratio pruned / original."""

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
    metrics that are not a mean over documents. `retention`: 100 pruned / original, None where it is meaningless."""

    name: str
    original: float
    pruned: float
    interval: list[float] = field(default_factory=list)
    retention: float | None = None


@dataclass(frozen=True)
class MeasuredTask:
    """Both models on the same documents of one task of lm-evaluation-harness, zero-shot. `sha256`: of the documents,
    prompts and targets in order; `dataset` and `config`: the harness' data set; `source`: the source of these
    documents; `documents` of `total`: fewer with a limit. `main`: the name of the headline metric."""

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
    """Perplexity of an ONNX file on the sequences of the `MeasuredText` named `text`; `interval`: 95% bootstrap
    interval of its ratio to the checkpoint's."""

    text: str
    perplexity: float
    interval: list[float]


@dataclass(frozen=True)
class MeasuredFile:
    """An ONNX file on ONNX Runtime. `sha256`: of the graph; `data_sha256`: of its external weights, else empty."""

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
    process with this backend alone; None if not measured (on a GPU, or if the system does not report it)."""

    model: str
    backend: str
    batch: int
    prefill: Rate
    decode: Rate
    memory: int | None = None


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of a prompt by both models."""

    prompt: str
    original: str
    pruned: str


@dataclass(frozen=True)
class Measured:
    """The results of `evaluate`. They hold for the weights with `weights_sha256` (see `layout.weights_sha256`) and for
    the ONNX files with the hashes in `files`; `evaluation.staleness` drops them if the folder has others. `original`:
    the model compared with, identified by `original_commit` on the Hub or `original_sha256` of its weights."""

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
