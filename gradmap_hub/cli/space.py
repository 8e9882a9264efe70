"""`gradmap-hub space` and `compare`: write the comparison app as a Space folder, or run it on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape

from gradmap_hub.cli.options import Folder, Host, Json, Port, Quiet
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import DEFAULT_CALIBRATION
from gradmap_hub.errors import UsageError
from gradmap_hub.space.kinds import Kind

Against = Annotated[
    str | None, typer.Option("--against", help="The original: a Hub id or a folder. Default: the recorded one.")
]
SpaceText = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text for the perplexity of the original's int8 and int4, if FOLDER has such files: a file, or a Hub "
        "dataset.",
    ),
]


SpaceKind = Annotated[
    str,
    typer.Option(
        "--space",
        metavar="KIND",
        help="gradio, browser or zero, as for push. `publish` takes another kind if the account may not have it.",
    ),
]
In = Annotated[
    str,
    typer.Option(
        "--in",
        metavar="PLACE",
        help="app: the Gradio app, with ONNX Runtime for Python. browser: the page on which both models run in the "
        "browser.",
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
    kind: SpaceKind = "gradio",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the comparison Space for FOLDER next to it (FOLDER-space)."""
    from gradmap_hub.pipeline.space import build_space

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        built = build_space(folder, against, kind=_kind(kind), text=text, reporter=reporter)
    place = " --in browser" if kind == "browser" else ""
    view = escape(f"Written to {built}. Run it with: gradmap-hub compare {folder}{place}")
    emit(Result({"folder": str(folder), "space_folder": str(built)}, [view]), as_json)


def compare(
    folder: Folder,
    against: Against = None,
    text: SpaceText = DEFAULT_CALIBRATION,
    place: In = "app",
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
    """Run the comparison for FOLDER on this machine: the same files as the published Space."""
    from gradmap_hub.pipeline.space import build_space
    from gradmap_hub.space.local import at_a_screen, run_space

    if place not in ("app", "browser"):
        raise UsageError(f"--in takes app or browser; got {place!r}.")
    wanted = at_a_screen() if open_browser is None else open_browser
    if place == "browser":
        _compare_in_browser(folder, against, text, host, port, wanted, quiet)
        return
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        built = build_space(folder, against, local=True, text=text, reporter=reporter)
    run_space(built, {"PRUNED_MODEL": str(folder.resolve())}, host=host, port=port, open_browser=wanted)


def _compare_in_browser(
    folder: Path, against: str | None, text: str, host: str, port: int, open_browser: bool, quiet: bool
) -> None:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.space import build_space, local_page
    from gradmap_hub.space.static_server import serve_page

    hub = Hub()
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        built = build_space(folder, against, local=True, kind="browser", text=text, reporter=reporter, hub=hub)
        page = local_page(folder, hub.endpoint)
        serve_page(built, page, host=host, port=port, open_browser=open_browser, reporter=reporter)


def _kind(text: str) -> Kind:
    for kind in get_args(Kind):
        if kind == text:
            return kind
    raise UsageError(f"--space takes {', '.join(get_args(Kind))}; got {text!r}.")
