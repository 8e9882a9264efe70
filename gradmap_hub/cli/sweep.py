"""`gradmap-hub sweep`: measure quality, size and speed at several ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from gradmap_hub.cli.options import (
    HOW,
    Json,
    Model,
    PruneOptions,
    Quiet,
    Revision,
    command_line,
    parse_ratios,
    prune_options,
)
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import SweepConfig, help_of

if TYPE_CHECKING:
    from gradmap_hub.sweeping.record import SweepRecord


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Example: gradmap-hub sweep HuggingFaceTB/SmolLM2-135M-Instruct --ratios 0.1,0.2,0.3 -c text.txt"
    )(sweep)


@prune_options(*HOW)
def sweep(
    model: Model,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help=help_of(SweepConfig, "output"), show_default=False)
    ] = None,
    *,
    ratios: Annotated[str, typer.Option("--ratios", help=help_of(SweepConfig, "ratios"))] = "0.1,0.2,0.3",
    max_loss: Annotated[
        float | None, typer.Option("--max-loss", metavar="PERCENT", help=help_of(SweepConfig, "max_loss"))
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help=help_of(SweepConfig, "speed"))] = True,
    revision: Revision = None,
    options: PruneOptions,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure quality, size and speed of MODEL at several ratios, each once. No checkpoint is written."""
    wanted = parse_ratios(ratios)
    config = SweepConfig(
        model=model,
        ratios=wanted,
        prune=options.method(),
        revision=revision,
        output=output,
        speed=speed,
        max_loss=max_loss,
    )
    from gradmap_hub.pipeline.sweep import sweep as run_sweep

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        record, folder = run_sweep(config, command=command_line(), reporter=reporter)
    emit(Result({"folder": str(folder), **asdict(record)}, _view(record, folder)), as_json)


def _view(record: SweepRecord, folder: Path) -> Iterator[RenderableType]:
    from gradmap_hub.sweeping.report import TABLE_FILE, columns, recommended, rows, verdict

    table = Table(title=escape(record.base.name), title_justify="left")
    for head in columns(record):
        table.add_column(escape(head), justify="right")
    chosen = recommended(record)
    for point, row in zip([None, *record.points], rows(record, ranges=False), strict=True):
        marked = chosen is not None and point is chosen
        table.add_row(*map(escape, row), style="bold" if marked else None)
    yield table
    yield escape(f"Written to {folder}; {TABLE_FILE} lists the texts one by one.")
    yield escape(f"\n{verdict(record)}")
    if record.recommendation.push:
        yield escape(record.recommendation.push)
