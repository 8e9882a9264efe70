"""The writers: for each format, the function that writes its file. int8 and int4 have recipes instead (recipes.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradmap_hub import formats
from gradmap_hub.exporters import onnx
from gradmap_hub.exporters.alias import link
from gradmap_hub.exporters.inputs import Inputs, run_worker
from gradmap_hub.formats import FORMATS, ONNX, Format

# Writes the file of one format to the path, in a new folder. `export` moves all files in that folder into onnx/.
Writer = Callable[[Inputs, Path], None]


def write_optimum(inputs: Inputs, path: Path) -> None:
    """Write Optimum's float32 graph and the configuration files beside it."""
    for file in onnx.file_names(inputs.optimum().parent):
        link(file, path.with_name(file.name))


def write_genai(inputs: Inputs, path: Path) -> None:
    """Write GenAI's float32 graph."""
    run_worker("graph", {"source": str(inputs.float32()), "destination": str(path)})


def write_half(inputs: Inputs, path: Path) -> None:
    """Write the float32 graph converted to float16."""
    run_worker("half", {"base": str(inputs.float32()), "destination": str(path)})


WRITERS: dict[str, Writer] = {ONNX: write_optimum, "genai": write_genai, "fp16": write_half}


def register(row: Format, write: Writer) -> None:
    """Add a format for this process: a row of `gradmap_hub.formats` and its writer.

    Raises:
        ValueError: another format has its name, file, artifact name or precision in a Space.
    """
    formats.add_row(row)
    WRITERS[row.name] = write


def unregister(name: str) -> None:
    """Remove a registered format."""
    del FORMATS[name], WRITERS[name]
