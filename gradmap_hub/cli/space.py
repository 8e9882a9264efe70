"""`gradmap-hub space` and `compare`: the comparison app as a Space folder, or run on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from gradmap_hub.cli.options import Folder, Host, Json, Port, Quiet
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import DEFAULT_CALIBRATION

Against = Annotated[str | None, typer.Option("--against", help="The original; default: as recorded.")]
SpaceText = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text for the perplexity of the original's int8 and int4, if FOLDER has such files: a file, or a Hub "
        "dataset.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add both commands to the command line."""
    app.command(epilog="Example: gradmap-hub space small --against HuggingFaceTB/SmolLM2-135M-Instruct")(space)
    app.command(epilog="Example: gradmap-hub compare small")(compare)


def space(
    folder: Folder,
    against: Against = None,
    text: SpaceText = DEFAULT_CALIBRATION,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the comparison Space for FOLDER next to it (FOLDER-space)."""
    from gradmap_hub.pipeline.space import build_space

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        built = build_space(folder, against, text=text, reporter=reporter)
    view = escape(f"Written to {built}. Run it with: gradmap-hub compare {folder}")
    emit(Result({"folder": str(folder), "space_folder": str(built)}, [view]), as_json)


def compare(
    folder: Folder,
    against: Against = None,
    text: SpaceText = DEFAULT_CALIBRATION,
    host: Host = "127.0.0.1",
    port: Port = 0,
    open_browser: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open",
            help="Open the page in a browser. Default: yes, in a terminal with a display.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the comparison app for FOLDER on this machine: the same files as the published Space."""
    from gradmap_hub.pipeline.space import build_space
    from gradmap_hub.space.local import at_a_screen, run_space

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        built = build_space(folder, against, local=True, text=text, reporter=reporter)
    wanted = at_a_screen() if open_browser is None else open_browser
    run_space(built, {"PRUNED_MODEL": str(folder.resolve())}, host=host, port=port, open_browser=wanted)
