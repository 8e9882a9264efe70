"""Scores of both models on the same documents of each task of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.evaluation import tasks
from gradmap_hub.evaluation.measurement import ORIGINAL, PRUNED, Context, Step
from gradmap_hub.evaluation.metrics import difference_interval
from gradmap_hub.evaluation.tasks import TaskResult
from gradmap_hub.layout import sha256_of
from gradmap_hub.measurements import MeasuredMetric, MeasuredTask


def steps(context: Context) -> list[Step[TaskResult]]:
    return [_task(context, which, name) for which in (ORIGINAL, PRUNED) for name in context.tasks]


def _task(context: Context, which: str, name: str) -> Step[TaskResult]:
    config, task = context.config, tasks.TASKS[name]

    def compute() -> TaskResult:
        model: Any = context.models.decoder(which).model
        return tasks.run_tasks(
            model,
            context.tokenizer,
            [name],
            documents=config.tasks_from,
            limit=config.limit,
            started=context.reporter.total,
            advanced=context.reporter.advance,
        )[name]

    def describe(found: TaskResult) -> str:
        main = found.metric(task.main)
        return f"{main.name} {main.value:.3f} on {found.documents:,} documents"

    return Step(
        f"{which}-{name}",
        f"{which.capitalize()} on {name}",
        TaskResult,
        compute,
        weights=(which,),
        inputs={
            "limit": config.limit,
            "documents": None if config.tasks_from is None else sha256_of(config.tasks_from / task.file),
            "harness": tasks.harness_version(),
        },
        loads=which,
        describe=describe,
    )


def result(context: Context, found: Mapping[str, Any]) -> list[MeasuredTask]:
    """The comparison of both models on each task.

    Raises:
        SourceError: the documents of a task changed between the two models.
    """
    local = context.config.tasks_from is not None
    return [compared(found[f"{ORIGINAL}-{name}"], found[f"{PRUNED}-{name}"], local=local) for name in context.tasks]


def compared(original: TaskResult, pruned: TaskResult, *, local: bool) -> MeasuredTask:
    """The comparison of both models on one task. `local`: the documents are from a folder, not fetched by the harness.

    Raises:
        SourceError: the two results are of different documents.
    """
    if original.sha256 != pruned.sha256:
        raise SourceError(
            f"The documents of {original.name} changed between the two models.", hint="Run the same command again."
        )
    metrics = []
    for before in original.metrics:
        after = pruned.metric(before.name)
        counted = bool(before.per_document)
        metrics.append(
            MeasuredMetric(
                before.name,
                before.value,
                after.value,
                difference_interval(before.per_document, after.per_document) if counted else [],
                100 * after.value / before.value if counted and before.value else None,
            )
        )
    task = tasks.TASKS[original.name]
    return MeasuredTask(
        name=original.name,
        version=original.version,
        dataset=original.dataset,
        config=original.config,
        split=original.split,
        source=task.file if local else original.dataset,
        documents=original.documents,
        total=original.total,
        sha256=original.sha256,
        main=task.main,
        metrics=metrics,
    )
