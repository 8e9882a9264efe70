"""`gradmap-hub export`: export a finished folder to ONNX files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from gradmap_hub.cli.options import Folder, Json, Quiet, split_names
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import DEFAULT_CALIBRATION
from gradmap_hub.formats import quantized


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub export small --to onnx,int8 --text notes.txt")(export)


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to", help=f"Formats, comma-separated: onnx (float32, Optimum's graph), {', '.join(quantized())}."
        ),
    ] = "onnx",
    text: Annotated[
        str,
        typer.Option("--text", help="Text for the perplexity of int8, int4 and genai: a file, or a Hub dataset."),
    ] = DEFAULT_CALIBRATION,
    keep_failing: Annotated[
        bool, typer.Option("--keep-failing", help="Keep a quantised file whose perplexity exceeds its limit.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a pruned folder to ONNX with KV cache, and compare every file with PyTorch."""
    from gradmap_hub.pipeline.export import export_folder

    with TerminalReporter(stderr, quiet=quiet) as reporter:
        record = export_folder(folder, split_names(to), text=text, keep_failing=keep_failing, reporter=reporter)
    exported = [asdict(artifact) for artifact in record.artifacts if artifact.format != "safetensors"]
    emit(Result({"folder": str(folder), "artifacts": exported}, _view(exported)), as_json)


def _view(exported: Sequence[dict[str, Any]]) -> Iterator[str]:
    for artifact in exported:
        quality = artifact["quality"]
        ratio = quality["perplexity"] / quality["checkpoint_perplexity"] if quality else None
        cost = f"  perplexity {100 * (ratio - 1):+z.1f} %" if ratio else ""
        yield escape(f"{artifact['path']}  {artifact['bytes']:,} bytes{cost}  sha256 {artifact['sha256']}")
