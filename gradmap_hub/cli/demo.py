"""`gradmap-hub demo`: the whole push on this machine, without an account."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape

from gradmap_hub.cli.options import Json, Onnx, Quiet, Resume
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import record_view
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import PruneConfig, help_of

if TYPE_CHECKING:
    from gradmap_hub.pipeline.demo import DemoResult


# Enough to bring the perplexity down visibly, and no more, so that the demo stays short.
HEAL = "48k"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub demo --output try --open")(demo)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files; new or empty.")] = Path(
        "gradmap-demo"
    ),
    ratio: Annotated[float, typer.Option("--ratio", "-r", help=help_of(PruneConfig, "ratio"))] = 0.25,
    heal: Annotated[
        str, typer.Option(metavar="BUDGET", help="Budget of healing: tokens (48k) or time (3m); 0: none.")
    ] = HEAL,
    space: Annotated[bool, typer.Option("--space/--no-space", help="Build and publish the comparison Space.")] = True,
    onnx: Onnx = True,
    open_browser: Annotated[bool, typer.Option("--open", help="Run the published Space and open it.")] = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole push on this machine, without an account: a real 135M model, a real Hub client, an embedded Hub."""
    from gradmap_hub.pipeline.demo import run_demo

    PruneConfig(ratio=ratio, heal=heal)  # refuse a bad ratio or budget before anything is downloaded
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        run_demo(
            output, ratio=ratio, heal=heal, onnx=onnx, space=space, resume=resume, quiet=quiet, reporter=reporter,
            open_browser=open_browser and not as_json,
            finished=lambda done: emit(Result(done.json(), _view(done)), as_json),
        )  # fmt: skip


def _view(result: DemoResult) -> Iterator[RenderableType]:
    yield from record_view(result.record)
    model, space = result.pushed["model"], result.pushed["space"]
    yield escape(f"\nmodel  {model['url']}  commit {model['commit']}")
    if "url" in space:
        yield escape(f"space  {space['url']}  commit {space['commit']}")
    else:
        yield escape(f"space  none: {space['reason']}")
    if result.answers:
        yield f"\nThe published Space answered {escape(json.dumps(result.answers['prompt']))}:"
        for name in ("original", "pruned"):
            answer = " ".join(result.answers[name]["text"].split())
            yield f"  [bold]{name:9}[/] {escape(answer)}"
    root = _shown(result.hub_root)
    yield escape(
        f"\nfolder   {_shown(result.folder)}\nhub data {root}\n"
        f"Browse both repositories again with: gradmap-hub hub --root {root}\n"
    )
    for difference in result.differences:
        yield f"[dim]- {escape(difference)}[/]"


def _shown(path: Path) -> str:
    """A path as typed in the working folder: relative if it is inside."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
