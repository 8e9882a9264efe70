"""The results of `evaluate`: the part of gradmap.json that compares a model folder with its original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gradmap_hub.reading import Count, Interval, NotNegative, OptionalInterval, PathInside, Positive, Some


@dataclass(frozen=True)
class BeforeAfter:
    """A count for the original (`before`) and for the result (`after`), such as parameters or bytes."""

    before: Some
    after: Count


@dataclass(frozen=True)
class Contamination:
    """Sequences of an evaluation text with a 13-gram overlap (lower-cased words) with a calibration sequence. `rows`:
    the number of such sequences among `of`; None if not checked, with the `reason`. `texts`: the calibration texts that
    they overlap with."""

    rows: Count | None
    of: Some
    reason: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        return None if self.rows is None else self.rows / self.of


@dataclass(frozen=True)
class TextMetric:
    """Mean of a metric over the predicted tokens of a text, with its 95% bootstrap interval over sequences. `title`:
    heading on card and terminal; `share`: shown as a percentage."""

    name: str
    title: str
    value: float
    interval: Interval
    share: bool = False


@dataclass(frozen=True)
class MeasuredText:
    """Both models on the same sequences of one text. Perplexity as in `TextPerplexity`; `agreement`: share of positions
    with the same top-1 token; `divergence`: mean KL(original || pruned), nats per token; `further`: all other metrics,
    in JSON only if there are any. Each interval is the 95% bootstrap interval over sequences; that of perplexity is of
    the ratio pruned / original."""

    name: str
    sha256: str
    rows: Count
    tokens: Count
    sequence_length: Count
    original: Positive
    pruned: Positive
    interval: Interval
    agreement: float
    agreement_interval: Interval
    divergence: float
    divergence_interval: Interval
    contamination: Contamination | None = None
    further: list[TextMetric] = field(default_factory=list)

    @property
    def metrics(self) -> list[TextMetric]:
        """All metrics that compare the two models, as card and terminal list them."""
        return [
            TextMetric("agreement", "Top-1 agreement", self.agreement, self.agreement_interval, share=True),
            TextMetric("divergence", "KL divergence, nats per token", self.divergence, self.divergence_interval),
            *self.further,
        ]


@dataclass(frozen=True)
class MeasuredMetric:
    """One metric of one task. `interval`: 95% bootstrap interval over documents of pruned - original, empty for
    metrics that are not a mean over documents; `retention`: pruned in percent of original, None for those metrics
    or if original is 0."""

    name: str
    original: float
    pruned: float
    interval: OptionalInterval = field(default_factory=list)
    retention: float | None = None


@dataclass(frozen=True)
class MeasuredTask:
    """Both models on the same documents of one task of lm-evaluation-harness, zero-shot. `sha256`: of the documents,
    prompts and targets in order; `dataset` and `config`: the harness' source; `source`: the source of these documents;
    `documents`: the number used of `total`; `main`: name of the main metric."""

    name: str
    version: str
    dataset: str
    config: str | None
    split: str
    source: str
    documents: Count
    total: Count
    sha256: str
    main: str
    metrics: list[MeasuredMetric]

    @property
    def main_metric(self) -> MeasuredMetric:
        return next(metric for metric in self.metrics if metric.name == self.main)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for each contradiction between fields."""
        if self.main not in [metric.name for metric in self.metrics]:
            yield "main", "names no metric of the task"


@dataclass(frozen=True)
class FilePerplexity:
    """Perplexity of an ONNX file on the sequences of the `MeasuredText` of that name. `interval`:
    95% bootstrap interval of its ratio to the checkpoint's perplexity."""

    text: str
    perplexity: Positive
    interval: Interval


@dataclass(frozen=True)
class MeasuredFile:
    """An ONNX file on ONNX Runtime. `sha256`: of the graph; `data_sha256`: of the weight file next to it, empty if it
    has none."""

    path: PathInside
    bytes: Count
    sha256: str
    data_sha256: str
    perplexity: list[FilePerplexity]


@dataclass(frozen=True)
class Rate:
    """Tokens per second: median of the rounds and its 95% bootstrap interval."""

    median: NotNegative
    low: NotNegative
    high: NotNegative


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed and memory of one model on one backend. `model`: original or pruned; `backend`: "PyTorch" or the path of an
    ONNX file; `memory`: peak resident bytes of a process with this backend alone, None if not measured (on a GPU, not
    on Linux, or the process died)."""

    model: str
    backend: str
    batch: Count
    prefill: Rate
    decode: Rate
    memory: Count | None = None


@dataclass(frozen=True)
class Sample:
    """Greedy answers of both models to a prompt."""

    prompt: str
    original: str
    pruned: str


def repeated_share(text: str, n: int = 4) -> float:
    """Share of the `n`-grams of words that occurred earlier in the text; 0 for a text of fewer than `n` words."""
    words = text.lower().split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Measured:
    """Results of `evaluate`, valid for weights with the checksum `weights_sha256` (of `layout.weights_sha256`) and ONNX
    files with the checksums in `files`; `evaluation.staleness` drops them otherwise. `original`: the model compared
    with, identified by `original_commit` on the Hub or `original_sha256` of its weights."""

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

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for each contradiction between fields."""
        if not self.texts:
            yield "texts", "is empty"
        elif len({len(text.metrics) for text in self.texts}) > 1:
            yield "texts", "have different metrics"

    @property
    def repeated(self) -> tuple[float, float] | None:
        """Mean `repeated_share` of the original's and of the pruned model's greedy answers; None without answers."""
        if not self.samples:
            return None
        answers = ([sample.original for sample in self.samples], [sample.pruned for sample in self.samples])
        original, pruned = (sum(map(repeated_share, texts)) / len(texts) for texts in answers)
        return original, pruned
