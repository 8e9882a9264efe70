"""The process that compares Optimum's graph with PyTorch if the calling process has transformers 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gradmap_hub.exporters.onnx import measure


def main(checkpoint: str, graph: str) -> dict[str, Any]:
    """Compare the checkpoint with `graph`, the folder written by `onnx.export_onnx`. Returns the fields of a Parity."""
    return dataclasses.asdict(measure(Path(checkpoint), Path(graph)))
