"""`gradmap-hub prune`: a pruned model in a folder, nothing published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape

from gradmap_hub.cli.options import (
    HOW,
    HOW_MUCH,
    From,
    Json,
    ModelOrRecord,
    PruneOptions,
    Quiet,
    Resume,
    Revision,
    command_line,
    prune_options,
    repeat_record,
)
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import record_json, record_view
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.errors import UsageError
from gradmap_hub.record import RunRecord


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub prune HuggingFaceTB/SmolLM2-135M-Instruct small --layers 8")(prune)


@prune_options(*HOW_MUCH, *HOW)
def prune(
    context: typer.Context,
    model: ModelOrRecord = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="Folder for the result; new or empty.")
    ] = None,
    from_: From = None,
    *,
    options: PruneOptions,
    revision: Revision = None,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL into the folder OUTPUT: checkpoint, tokenizer, card and gradmap.json. Publishes nothing."""
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.prune import prune as run_prune

    if from_ is not None and output is None and model is not None:  # with a record, a single argument is OUTPUT
        model, output = None, Path(model)
    if output is None or (model is None and from_ is None):
        raise UsageError("prune takes MODEL and OUTPUT, or --from RECORD and OUTPUT.")
    hub = Hub()
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        repeats = None
        if from_ is None:
            config = options.config()
        else:
            again = repeat_record(context, from_, model, revision, options, hub, reporter)
            model, revision, repeats = again.model, again.revision, again.expected
            config = options.with_preset(again.prune)
        record = run_prune(
            model or "", output, config, revision=revision, resume=resume, command=command_line(), reporter=reporter,
            hub=hub, repeats=repeats,
        )  # fmt: skip
    emit(Result(record_json(record, output), _view(record, output)), as_json)


def _view(record: RunRecord, output: Path) -> Iterator[RenderableType]:
    yield from record_view(record)
    yield escape(f"\nWritten to {output}. Publish it with: gradmap-hub publish {output}")
