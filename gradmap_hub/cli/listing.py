"""`gradmap-hub list` and `gradmap-hub clean`: show the runs below a folder, and delete their work folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from gradmap_hub.cli.options import Json
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import record_json
from gradmap_hub.errors import UsageError
from gradmap_hub.record import RunRecord
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.pipeline.runs import Found

Root = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to look, three folders deep.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("list", epilog="Example: gradmap-hub list ~/models")(list_runs)
    app.command(epilog="Example: gradmap-hub clean ~/models --dry-run")(clean)


def list_runs(folder: Root = Path(), as_json: Json = False) -> None:
    """List the pruned models and unfinished runs below FOLDER, from their records."""
    from gradmap_hub.pipeline.runs import find_runs

    found = find_runs(folder)
    emit(Result({"runs": [_json(run) for run in found]}, _view(found, folder)), as_json)


def clean(
    folder: Root = Path(),
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also those of unfinished runs, which then start from the beginning.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete the work folders (OUTPUT.work) of finished runs below FOLDER. The results stay.

    Without its work folder, `evaluate` and `heal` of that result compute everything again.
    """
    from gradmap_hub.pipeline.runs import find_runs, remove_work

    found = [run for run in find_runs(folder) if run.work is not None and (run.finished or unfinished)]
    total = sum(run.work_bytes for run in found)
    if not as_json:
        for run in found:
            stderr.print(f"{escape(str(run.work))}  {size(run.work_bytes)}", highlight=False)
    if found and not (dry_run or yes):
        if as_json:
            raise UsageError("--json needs --yes to delete anything, or --dry-run.")
        typer.confirm(f"Delete {len(found)} folders, {size(total)}?", abort=True, err=True)
    kept = {} if dry_run else {str(run.work): why for run, why in remove_work(found) if why}
    gone = [] if dry_run else [str(run.work) for run in found if str(run.work) not in kept]
    freed = sum(run.work_bytes for run in found if str(run.work) in gone)
    answer = {"found": [str(run.work) for run in found], "deleted": gone, "bytes": freed, "kept": kept}
    emit(Result(answer, _said(found, total, gone, freed, kept, dry_run)), as_json)
    if kept:
        raise typer.Exit(1)


def _said(
    found: Sequence[Found], total: int, gone: Sequence[str], freed: int, kept: dict[str, str], dry_run: bool
) -> Iterator[RenderableType]:
    if not found:
        yield "No work folders of finished runs."
    elif dry_run:
        yield f"{len(found)} folders, {size(total)}; nothing was deleted."
    else:
        yield f"Deleted {len(gone)} folders, {size(freed)}."
    for path, why in kept.items():
        yield escape(f"{path} was kept: {why}")


def _json(run: Found) -> dict[str, Any]:
    record = run.record
    facts: dict[str, Any] = {"folder": str(run.folder), "finished": run.finished, "problem": run.problem}
    if record is not None:
        heal = record.heal
        facts |= record_json(record, run.folder) | {
            "name": record.name,
            "original": record.base.name,
            "ratio": record.ratio,
            "healed_tokens": heal.tokens if heal is not None and heal.applied else 0,
            "formats": _formats(record),
            "target": record.target,
            "space": record.space,
        }
    return facts | {
        "size": run.bytes,
        "work": str(run.work) if run.work is not None else None,
        "work_size": run.work_bytes,
    }


def _formats(record: RunRecord) -> list[str]:
    return sorted({entry.format for entry in record.artifacts})


def _view(found: Sequence[Found], root: Path) -> Iterator[RenderableType]:
    if not found:
        yield escape(f"No runs in {root.absolute()} or three folders below.")
        return
    for run in found:
        folder = run.folder.relative_to(root) if run.folder.is_relative_to(root) else run.folder
        yield f"[bold]{escape(str(folder))}[/]"
        yield escape("  " + ", ".join(_facts(run)))


def _facts(run: Found) -> Iterator[str]:
    record = run.record
    if record is None:
        yield run.problem
    else:
        yield f"{record.layers_before} -> {record.layers_after} layers of {record.base.name}"
        if record.evaluation is not None:
            yield f"perplexity {record.evaluation.before:.2f} -> {record.evaluation.after:.2f}"
        if record.heal is not None and record.heal.applied:
            yield f"healed with {record.heal.tokens:,} tokens"
        yield " and ".join(_formats(record))
        if record.target is not None:
            yield f"published as {record.target}"
    yield size(run.bytes)
    if run.work is not None:
        yield f"work folder {size(run.work_bytes)}" + (" (healing unfinished)" if run.healing else "")
