"""`gradmap-hub heal`: train a finished folder further, with its original as the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape

from gradmap_hub.cli.options import Folder, Json, Quiet
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import record_json, record_view
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import help_of
from gradmap_hub.distributed import is_main
from gradmap_hub.folder_config import HealConfig
from gradmap_hub.record import RunRecord


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub heal small --tokens 10M --text notes.txt --text self")(heal)


def heal(
    folder: Folder,
    tokens: Annotated[str | None, typer.Option("--tokens", metavar="N", help=help_of(HealConfig, "tokens"))] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="TIME", help=help_of(HealConfig, "time"))] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help=escape(help_of(HealConfig, "text")))] = None,
    part: Annotated[str, typer.Option("--part", help=help_of(HealConfig, "part"))] = "auto",
    against: Annotated[str | None, typer.Option("--against", help=help_of(HealConfig, "against"))] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Distil the original into a pruned folder, and rewrite its weights, exports, record and card.

    Run the same command again to resume an interrupted run. On several GPUs:
    accelerate launch -m gradmap_hub heal small --tokens 100M
    """
    from gradmap_hub.pipeline.heal_folder import heal_folder

    config = HealConfig(tokens, time, tuple(text or ()), part, against)
    with TerminalReporter(stderr, quiet=quiet or not is_main()) as reporter:
        record = heal_folder(folder, config, reporter=reporter)
    if not is_main():
        return
    emit(Result(record_json(record, folder), _view(record, folder)), as_json)


def _view(record: RunRecord, folder: Path) -> Iterator[RenderableType]:
    yield from record_view(record)
    yield escape(f"\nPublish it with: gradmap-hub publish {folder}")
