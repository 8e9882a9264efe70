"""`gradmap-hub sweep`: quality against size and speed, at one ratio after another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
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
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import SweepConfig, help_of
from gradmap_hub.sweeping.record import SweepRecord

stdout = Console(soft_wrap=True)
stderr = Console(stderr=True, soft_wrap=True)


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
    """Measure what MODEL loses and gains at several ratios. No checkpoint is written; a ratio is measured once."""
    wanted = parse_ratios(ratios)
    config = SweepConfig(
        model=model,
        ratios=wanted,
        prune=options.config(ratio=wanted[0]),
        revision=revision,
        output=output,
        speed=speed,
        max_loss=max_loss,
    )
    from gradmap_hub.pipeline.sweep import sweep as run_sweep

    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        record, folder = run_sweep(config, command=command_line(), reporter=reporter)
    finally:
        reporter.close()
    if as_json:
        answer = {"folder": str(folder), **asdict(record)}
        print(json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False), flush=True)
    else:
        _print(record, folder)


def _print(record: SweepRecord, folder: Path) -> None:
    from gradmap_hub.sweeping.report import TABLE_FILE, columns, recommended, rows, verdict

    table = Table(title=escape(record.base.name), title_justify="left")
    for head in columns(record):
        table.add_column(escape(head), justify="right")
    chosen = recommended(record)
    for point, row in zip([None, *record.points], rows(record, ranges=False), strict=True):
        marked = chosen is not None and point is chosen
        table.add_row(*map(escape, row), style="bold" if marked else None)
    stdout.print(table)
    stdout.print(f"Written to {escape(str(folder))}; {TABLE_FILE} has the texts one by one.", highlight=False)
    stdout.print(f"\n{escape(verdict(record))}", highlight=False)
    if record.recommendation.push:
        stdout.print(escape(record.recommendation.push), highlight=False)
