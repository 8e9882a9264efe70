"""What several commands print: the JSON objects and the tables of a record, of a published model and of a plan."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradmap_hub.cli.output import stdout
from gradmap_hub.record import HealRecord, RunRecord
from gradmap_hub.units import duration, ranges

if TYPE_CHECKING:
    from gradmap_hub.pipeline.checks import Check
    from gradmap_hub.pipeline.publish import PushResult


def record_json(record: RunRecord, folder: Path) -> dict[str, Any]:
    """The part of the JSON output that prune, heal, list, push, publish and demo share."""
    evaluation = record.evaluation
    return {
        "folder": str(folder),
        "removed": record.removed,
        "layers": {"before": record.layers_before, "after": record.layers_after},
        "parameters": asdict(record.parameters),
        "bytes": asdict(record.bytes),
        "perplexity": {
            "original": evaluation.before,
            "pruned": evaluation.uncompensated,
            "compensated": evaluation.after,
        }
        if evaluation
        else None,
        "texts": [asdict(text) for text in evaluation.texts] if evaluation else [],
    }


def push_json(result: PushResult) -> dict[str, Any]:
    """The JSON output of push and publish."""
    space: dict[str, Any] = {"reason": result.space_reason}
    if result.space is not None:
        space = {"repo_id": result.space.repo_id, "commit": result.space.commit, "url": result.space.url}
        space["kind"] = result.space_kind
        if result.space_state is not None:
            space |= {"stage": result.space_state.stage, "state": result.space_state.words}
    further: dict[str, Any] = {}
    if result.model.pull_request:
        further["pull_request"] = result.model.pull_request
    if result.collection is not None:
        further["collection"] = asdict(result.collection)
    elif result.collection_reason:
        further["collection"] = {"reason": result.collection_reason}
    return {
        "model": {"repo_id": result.model.repo_id, "commit": result.model.commit, "url": result.model.url},
        **further,
        "space": space,
        "space_folder": str(result.space_folder) if result.space_folder else None,
        **record_json(result.record, result.folder),
    }


def visibility(*, create_pr: bool, public: bool) -> str:
    """The visibility of a target after publishing."""
    return "as it is" if create_pr else "public" if public else "private"


def plan_view(facts: Mapping[str, str], checks: Sequence[Check], unchanged: str) -> Iterator[RenderableType]:
    """What --dry-run shows: `facts` by name, the checks that passed, and a last line on what was left `unchanged`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    yield table
    table = Table(show_header=False, box=None, pad_edge=False, title="\nChecked", title_justify="left")
    for check in checks:
        table.add_row("[green]ok[/]", f"[dim]{check.name}[/]", escape(check.result))
    yield table
    yield f"\n{unchanged}"


def record_view(record: RunRecord) -> Iterator[RenderableType]:
    """Sizes and perplexities before and after, and what was done to the model."""
    yield _record_table(record)
    yield f"Removed layers {', '.join(map(str, record.removed))} ({escape(record.metric)})."
    compensation = record.compensation
    if compensation.applied:
        places = [f"{entry.layer} ({entry.part})" for entry in compensation.corrections]
        fits = f"a {compensation.kind} fit" if len(places) == 1 else f"{compensation.kind} fits"
        layers = f"layer{'s' if len(places) > 1 else ''} {', '.join(places)}"
        yield escape(f"Compensated by {fits}, folded into {layers}.")
    else:
        yield escape(f"Compensation not applied: {compensation.reason}.")
    if record.heal is not None and record.heal.applied:
        yield f"Healed {healing_text(record.heal)}."
    elif record.heal is not None:
        yield escape(f"Healing not applied: {record.heal.reason}.")


def _record_table(record: RunRecord) -> Table:
    healed = record.heal is not None and record.heal.applied
    compensated = record.compensation.applied or not healed  # the column exists even if nothing was applied
    result = "pruned" + " + compensated" * compensated + " + healed" * healed
    table = Table("", "original", "pruned", result, title_justify="left", title=escape(record.base.name))
    table.add_row("layers", str(record.layers_before), str(record.layers_after), str(record.layers_after))
    share = 1 - record.parameters.after / record.parameters.before
    after = f"{record.parameters.after / 1e6:.1f}M (-{share:.1%})"
    table.add_row("parameters", f"{record.parameters.before / 1e6:.1f}M", after, after)
    size = f"{record.bytes.after / 1e6:.1f} MB"
    table.add_row("weights", f"{record.bytes.before / 1e6:.1f} MB", size, size)
    for text in record.evaluation.texts if record.evaluation else []:
        kind = "held-out sequences" if text.kind.startswith("calibration") else text.kind
        label = f"perplexity, {text.name}\n  {kind}, {text.tokens:,} tokens"
        values = [f"{value:.2f}" for value in (text.original, text.pruned, text.compensated)]
        table.add_row(escape(label), *values)
    return table


def next_view(result: PushResult, *, quiet: bool) -> Iterator[RenderableType]:
    """What a person can do next: scan the Space's address as a QR code, or run the comparison here. No QR code if
    `quiet` or if stdout is not a terminal."""
    if result.space is not None and not quiet and stdout.is_terminal:
        yield ""
        yield Text(qr_code(result.space.url), style="#ffffff on #000000")  # light and dark as scanners want it
    place = " --in browser" if result.space_kind == "browser" else ""
    yield escape(f"try it here  gradmap-hub compare {shlex.quote(str(result.folder))}{place}")


def qr_code(text: str) -> str:
    """A QR code of the text in half-block characters, which draw its light modules."""
    import segno

    out = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(out, compact=True, border=2)
    return out.getvalue().rstrip("\n")


def published_view(result: PushResult) -> Iterator[str]:
    """Where model, Space and collection are now."""
    yield escape(f"\nmodel  {result.model.url}  commit {result.model.commit}")
    if result.model.pull_request is not None:
        yield escape(f"pull request  {result.model.pull_request}")
    if result.space is not None:
        yield escape(f"space  {result.space.url}  commit {result.space.commit}")
        if result.space_state is not None:
            yield escape(f"       {result.space_state.words}")
    else:
        yield escape(f"space  none: {result.space_reason}")
    if result.collection is not None:
        yield escape(f"collection  {result.collection.url}")
    elif result.collection_reason:
        yield escape(f"collection  not updated: {result.collection_reason}")
    yield escape(f"folder {result.folder}")


def healing_text(heal: HealRecord) -> str:
    """Such as "with 500,000 tokens in 21 min, layers 0-11: held-out loss 3.412 -> 2.934"."""
    spent = f"with {heal.tokens:,} tokens in {duration(heal.seconds)}" if heal.tokens else f"in {heal.steps} steps"
    return f"{spent}, layers {ranges(heal.layers)}: held-out loss {heal.loss_before:.3f} -> {heal.loss_after:.3f}"
