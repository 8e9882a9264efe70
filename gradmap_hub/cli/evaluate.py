"""`gradmap-hub evaluate`: measure a finished folder and its original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import help_of
from gradmap_hub.folder_config import EvaluateConfig
from gradmap_hub.measurements import Measured, MeasuredMetric, MeasuredTask
from gradmap_hub.record import RunRecord, as_data


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub evaluate small --tasks paper --limit 200")(evaluate)


def _help(name: str) -> str:
    return escape(help_of(EvaluateConfig, name))


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder made by prune or push.")],
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help=_help("against"))] = None,
    text: Annotated[list[str] | None, typer.Option("--text", metavar="SRC", help=_help("text"))] = None,
    tasks: Annotated[str, typer.Option("--tasks", help=_help("tasks"))] = "",
    tasks_from: Annotated[Path | None, typer.Option("--tasks-from", metavar="FOLDER", help=_help("tasks_from"))] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help=_help("limit"))] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help=_help("seq_len"))] = EvaluateConfig.seq_len,
    rows: Annotated[int, typer.Option("--rows", help=_help("rows"))] = EvaluateConfig.rows,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help=_help("speed"))] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure FOLDER and its original: perplexity, agreement, tasks, ONNX files, speed. Record and card are rewritten.

    Results are cached by weights and settings, so an interrupted evaluation continues where it stopped."""
    from gradmap_hub.pipeline.evaluate import evaluate_folder

    config = EvaluateConfig(
        against=against,
        text=tuple(text) if text else EvaluateConfig.text,
        tasks=tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip())),
        tasks_from=tasks_from,
        limit=limit,
        seq_len=seq_len,
        rows=rows,
        speed=speed,
    )
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        record = evaluate_folder(folder, config, reporter=reporter)
    emit(Result(evaluation_json(record, folder), _view(record)), as_json)


def evaluation_json(record: RunRecord, folder: Path) -> dict[str, Any]:
    """The JSON output of the command. `perplexity` and `data` are those of the first text; `texts` has all."""
    measured = record.measured
    if measured is None:  # the files changed during the evaluation
        return {"folder": str(folder), "perplexity": None, "tasks": {}, "data": None, "reason": record.measured_note}
    first = measured.texts[0]
    return {
        "folder": str(folder),
        "perplexity": {"original": first.original, "pruned": first.pruned, "interval": first.interval},
        "tasks": {task.name: _task_json(task) for task in measured.tasks},
        "data": {
            "source": first.name,
            "tokens": first.tokens,
            "sequence_length": first.sequence_length,
            "sha256": first.sha256,
        },
        "texts": [as_data(text) for text in measured.texts],
        "files": [as_data(entry) for entry in measured.files],
        "speed": [as_data(entry) for entry in measured.speed],
        "samples": [as_data(sample) for sample in measured.samples],
        "weights_sha256": measured.weights_sha256,
        "original": {
            "name": measured.original,
            "commit": measured.original_commit,
            "weights_sha256": measured.original_sha256,
        },
        "bytes": as_data(measured.bytes),
        "harness": measured.harness,
        "settings": measured.settings,
        "precision": measured.precision,
        "versions": measured.versions,
        "hardware": measured.hardware,
    }


def _task_json(task: MeasuredTask) -> dict[str, Any]:
    """A task in the JSON output. `interval`: 95% bootstrap interval of pruned - original in the main metric."""
    return {
        "original": {metric.name: metric.original for metric in task.metrics},
        "pruned": {metric.name: metric.pruned for metric in task.metrics},
        "metric": task.main,
        "interval": task.main_metric.interval,
        "intervals": {metric.name: metric.interval for metric in task.metrics if metric.interval},
        "retention": {metric.name: metric.retention for metric in task.metrics if metric.retention is not None},
        "documents": task.documents,
        "total": task.total,
        "version": task.version,
        "source": task.source,
        "sha256": task.sha256,
    }


def _view(record: RunRecord) -> Iterator[RenderableType]:
    measured = record.measured
    if measured is None:
        yield f"{escape(record.measured_note)}."
        return
    table = Table("", "original", "pruned", "", title=escape(measured.original), title_justify="left")
    for text in measured.texts:
        table.add_row(
            escape(f"perplexity, {text.name}"),
            f"{text.original:.2f}",
            f"{text.pruned:.2f}",
            rf"x {text.pruned / text.original:.3f} \[{text.interval[0]:.3f}, {text.interval[1]:.3f}]",
        )
        for entry in text.metrics:
            value = f"{100 * entry.value:.1f} %" if entry.share else f"{entry.value:.3f}"
            table.add_row(escape(f"  {entry.title}"), "", value, "")
        if text.contamination is not None and text.contamination.rows:
            shared = text.contamination
            table.add_row("  sequences with 13-gram overlap with calibration", "", f"{shared.rows} of {shared.of}", "")
    for task in measured.tasks:
        for metric in task.metrics:
            table.add_row(escape(f"{task.name}, {metric.name}"), *_metric_cells(metric, task))
    _add_files(measured, table)
    yield table
    if measured.speed:
        yield _speed_table(measured)
    for sample in measured.samples:
        yield f"\n[bold]{escape(sample.prompt)}[/]"
        for name, answer in (("original", sample.original), ("pruned", sample.pruned)):
            yield f"  {name:9} {escape(' '.join(answer.split()))}"
    if measured.repeated is not None:
        original, pruned = measured.repeated
        yield f"\n4-grams that an answer repeats: {100 * pruned:.1f} % (original {100 * original:.1f} %)"
    if record.measured_note:
        yield f"\n{escape(record.measured_note)}."


def _metric_cells(metric: MeasuredMetric, task: MeasuredTask) -> tuple[str, str, str]:
    if not metric.interval:
        return f"{metric.original:.3f}", f"{metric.pruned:.3f}", ""
    low, high = (100 * end for end in metric.interval)
    change = 100 * (metric.pruned - metric.original)
    words = rf"{change:+z.1f} \[{low:+z.1f}, {high:+z.1f}] on {task.documents:,}"
    return f"{100 * metric.original:.1f} %", f"{100 * metric.pruned:.1f} %", words


def _add_files(measured: Measured, table: Table) -> None:
    for entry in measured.files:
        for found in entry.perplexity:
            low, high = found.interval
            table.add_row(
                escape(f"{entry.path}, {found.text}"),
                "",
                f"{found.perplexity:.2f}",
                rf"x checkpoint \[{low:.4f}, {high:.4f}]",
            )


def _speed_table(measured: Measured) -> Table:
    table = Table("tokens per second", "batch", "prefill", "decode", "peak memory", title_justify="left")
    for entry in measured.speed:
        rates = [rf"{rate.median:,.1f} \[{rate.low:,.1f}, {rate.high:,.1f}]" for rate in (entry.prefill, entry.decode)]
        peak = f"{entry.memory / 1e6:,.0f} MB" if entry.memory is not None else "-"
        table.add_row(escape(f"{entry.model}, {entry.backend}"), str(entry.batch), *rates, peak)
    return table
