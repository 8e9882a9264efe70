"""`gradmap-hub inspect`: score the layers of a model, and show the layers that each ratio would remove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from gradmap_hub.cli.options import COMPUTING, Json, Model, PruneOptions, Quiet, Revision, parse_ratios, prune_options
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.errors import UsageError

if TYPE_CHECKING:
    from gradmap_hub.pipeline.inspect import Inspection
    from gradmap_hub.pruning.scores import LayerScores


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub inspect HuggingFaceTB/SmolLM2-135M-Instruct -c text.txt")(inspect)


@prune_options("calibration", "samples", "seq_len", "seed", *COMPUTING)
def inspect(
    model: Model,
    *,
    options: PruneOptions,
    revision: Revision = None,
    ratios: Annotated[
        str, typer.Option("--ratios", help="Ratios for which to show the layers to remove, comma-separated.")
    ] = "0.1,0.25",
    plot: Annotated[Path | None, typer.Option("--plot", help="Also plot the scores to this .png or .svg file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the layers of MODEL and show which ones each ratio would remove; nothing is removed."""
    if plot is not None and (plot.suffix not in (".png", ".svg") or not plot.parent.is_dir()):
        raise UsageError(f"--plot takes a .png or .svg file in an existing folder; got {plot}.")
    config, wanted = options.method(), parse_ratios(ratios)
    from gradmap_hub.pipeline.inspect import inspect as run_inspect

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        found = run_inspect(model, config, ratios=wanted, revision=revision, reporter=reporter)
    removed = {f"{ratio:.0%}": candidate.removed for ratio, candidate in found.choices.items()}
    if plot is not None:
        from gradmap_hub.pruning.plots import inspect_plot

        inspect_plot(found.scores, found.scores.shift, removed, plot)
    choices = [{"ratio": ratio, **asdict(candidate)} for ratio, candidate in found.choices.items()]
    answer = {**asdict(found.scores), "influence": found.scores.influence, "choices": choices}
    emit(Result(answer, _view(model, found, removed)), as_json)


def _view(model: str, found: Inspection, removed: Mapping[str, Sequence[int]]) -> Iterator[RenderableType]:
    yield inspect_table(model, found.scores, removed)
    for ratio, candidate in found.choices.items():
        yield escape(
            f"{ratio:.0%}: {len(candidate.removed)} layers by {candidate.name}, held-out loss {candidate.loss:.3f} "
            f"(all layers {found.scores.loss:.3f} on the scoring sequences)"
        )
    yield "Before swaps and compensation, which `prune` and `push` add."


def inspect_table(model: str, scores: LayerScores, choices: Mapping[str, Sequence[int]]) -> Table:
    """One row per layer: its scores, and which of `choices` (label such as "10%" -> layers) remove it."""
    table = Table(title=escape(model), title_justify="left")
    for name in ("layer", "gate", "gradient L1", "|W dL/dW|", "block influence"):
        table.add_column(name, justify="right")
    if choices:
        table.add_column("removed at")
    for layer, gate, gradient, taylor, influence in zip(
        scores.layers, scores.gate, scores.gradient, scores.taylor, scores.influence, strict=True
    ):
        row = [str(layer), f"{gate:.4g}", f"{gradient:.4g}", f"{taylor:.4g}", f"{influence:.4f}"]
        if choices:
            row.append(escape(", ".join(label for label, layers in choices.items() if layer in layers)))
        table.add_row(*row)
    return table
