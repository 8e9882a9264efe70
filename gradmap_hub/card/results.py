"""The results of `evaluate` in the formats of the Hub: entries of the card's model index, and files in .eval_results/.

The files follow https://huggingface.co/docs/hub/eval-results, which huggingface_hub 0.36 does not support. Only scores
of a whole benchmark are written to .eval_results/: all documents, from the source that the harness uses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from gradmap_hub.files import write_text
from gradmap_hub.layout import RESULTS_FOLDER
from gradmap_hub.measurements import MeasuredMetric, MeasuredTask
from gradmap_hub.record import RunRecord
from gradmap_hub.units import one_line

_ACCURACIES = ("acc", "acc_norm")
_TASK = {"type": "text-generation", "name": "Text Generation"}
_HUB = "https://huggingface.co"


# -- model index -----------------------------------------------------------------------------------------------------


def measured_results(record: RunRecord) -> list[dict[str, Any]]:
    """Entries of the model index: the pruned model on each task and text that was measured."""
    if record.measured is None:
        return []
    results = [entry for task in record.measured.tasks if (entry := _task_result(task))["metrics"]]
    return results + [
        perplexity_result(one_line(text.name), text.pruned)
        for text in record.measured.texts
        if math.isfinite(text.pruned)
    ]


def is_measured(record: RunRecord, name: str) -> bool:
    """Whether `evaluate` measured a text of this name."""
    return record.measured is not None and any(text.name == name for text in record.measured.texts)


def perplexity_result(name: str, value: float) -> dict[str, Any]:
    """The entry of the model index for one text."""
    metric = {"type": "perplexity", "name": "Token perplexity", "value": round(value, 4)}
    return {"task": dict(_TASK), "dataset": _dataset(name), "metrics": [metric]}


def _task_result(task: MeasuredTask) -> dict[str, Any]:
    dataset = {"name": one_line(task.name), "type": one_line(task.dataset), "split": one_line(task.split)}
    if task.config:
        dataset["config"] = one_line(task.config)
    part = "" if is_benchmark(task) else f", first {task.documents:,} documents of {task.source}"
    metrics = [
        {
            "type": "accuracy" if metric.name in _ACCURACIES else one_line(metric.name),
            "name": one_line(f"{metric.name}, zero-shot{part}"),
            "value": round(metric.pruned, 4),
        }
        for metric in task.metrics
        if math.isfinite(metric.pruned)
    ]
    return {"task": dict(_TASK), "dataset": dataset, "metrics": metrics}


def _dataset(name: str) -> dict[str, str]:
    """The `dataset` of an entry: its `type` is the Hub dataset id if the name has one (owner/name[:config[/split]]),
    else a slug of the name."""
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+)(?:/([\w.-]+))?)?(?:@[0-9a-f]{40})?", name)
    if hub and PurePosixPath(name).suffix not in (".txt", ".json", ".jsonl", ".parquet"):
        optional = {"config": hub[2], "split": hub[3]}
        return {"name": name, "type": hub[1]} | {key: value for key, value in optional.items() if value}
    return {"name": name, "type": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "text"}


# -- for the card ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskMean:
    """The unweighted mean of the main metrics of several tasks, for both models."""

    tasks: int
    original: float
    pruned: float

    @property
    def retention(self) -> float | None:
        return 100 * self.pruned / self.original if self.original else None


def task_mean(tasks: Sequence[MeasuredTask]) -> TaskMean | None:
    """The mean over the tasks whose main metric is an accuracy; None for fewer than two."""
    mains = [task.main_metric for task in tasks if is_accuracy(task.main_metric)]
    if len(mains) < 2:
        return None
    count = len(mains)
    return TaskMean(count, sum(m.original for m in mains) / count, sum(m.pruned for m in mains) / count)


def is_benchmark(task: MeasuredTask) -> bool:
    """Whether all documents of the harness' own source were used."""
    return task.documents == task.total and task.source == task.dataset


def is_accuracy(metric: MeasuredMetric) -> bool:
    return metric.name in _ACCURACIES


# -- .eval_results ---------------------------------------------------------------------------------------------------


def write_results(record: RunRecord, folder: Path) -> list[Path]:
    """Write .eval_results/TASK.yaml for every task measured as a whole benchmark, and delete those of earlier
    evaluations. Returns the files."""
    place = folder / RESULTS_FOLDER
    wanted = {f"{task.name}.yaml": _benchmark(task, record) for task in _whole(record)}
    for path in place.glob("*.yaml"):
        if path.name not in wanted:
            path.unlink()
    if not wanted:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        return []
    place.mkdir(exist_ok=True)
    for name, entry in wanted.items():
        text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000)
        write_text(place / name, text)
    return [place / name for name in wanted]


def _whole(record: RunRecord) -> list[MeasuredTask]:
    """The tasks measured as whole benchmarks, with an accuracy as main metric."""
    tasks = record.measured.tasks if record.measured else []
    return [
        task
        for task in tasks
        if is_benchmark(task)
        and is_accuracy(task.main_metric)
        and re.fullmatch(r"\w+", task.name, re.ASCII)  # it becomes a file name, and records are not trusted
    ]


def _benchmark(task: MeasuredTask, record: RunRecord) -> dict[str, Any]:
    harness = record.measured.harness if record.measured else None
    entry: dict[str, Any] = {
        "dataset": {"id": task.dataset, "task_id": task.config or "default"},
        "value": round(100 * task.main_metric.pruned, 2),
    }
    if record.target:
        entry["source"] = {"url": f"{_HUB}/{record.target}", "name": "Model card"}
    entry["notes"] = f"{task.main}, zero-shot, lm-evaluation-harness {harness}, {task.name} version {task.version}"
    return entry
