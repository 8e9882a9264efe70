"""`gradmap-hub doctor`: checks this installation, this machine and the Hub; the first command when something fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from gradmap_hub.cli.options import Json, Quiet
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.pipeline.doctor import Diagnosis


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub doctor --json > doctor.json")(doctor)


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is installed, what this machine can run and whether the Hub answers, and how to fix what is wrong.

    Exit status 1 if something is wrong. No token is shown.
    """
    from gradmap_hub.pipeline.doctor import doctor as run_doctor

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        found = run_doctor(reporter, offline=offline)
    answer = asdict(found)
    for extra, entry in zip(found.extras, answer["extras"], strict=True):
        entry["install"] = extra.install
    emit(Result(answer, _view(found)), as_json)
    if found.problems:
        raise typer.Exit(1)


def _view(found: Diagnosis) -> Iterator[RenderableType]:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("gradmap-hub", f"{found.gradmap_hub}, Python {found.python}")
    table.add_row("machine", escape(f"{found.system}, {found.cpus} CPU cores, {size(found.memory)}"))
    for device in found.devices:
        memory = f", {size(device.memory)}" if device.memory else ""
        table.add_row("device", escape(f"{device.kind}: {device.name}{memory}"))
    table.add_row("ONNX Runtime", escape(", ".join(found.providers) or "none"))
    names = ("torch", "transformers", "huggingface_hub", "optimum", "onnx", "onnxruntime", "gradio")
    versions = [f"{name} {found.packages[name]}" for name in names if name in found.packages]
    table.add_row("packages", escape(", ".join(versions)))
    table.add_row("ONNX exports", escape(f"with transformers {found.lane}: {found.export_environment}"))
    for extra in found.extras:
        state = "installed" if not extra.missing else escape(extra.install)
        table.add_row(f"extra {extra.name}", f"{state} [dim]({escape(extra.purpose)})[/]")
    hub = found.hub
    who = f"logged in as {hub.account} ({hub.role})" if hub.account else "no token: `hf auth login` to publish"
    table.add_row("Hub", escape(f"{hub.endpoint}: {who if hub.reachable and not hub.problem else hub.problem}"))
    for folder in found.folders:
        table.add_row("folder", escape(f"{folder.path}: {size(folder.free)} free ({folder.purpose})"))
    yield table
    for problem in found.problems:
        yield f"[red]problem[/] {escape(problem.what)}"
        yield f"        {escape(problem.mend)}"
    if not found.problems:
        yield "Nothing is wrong."
