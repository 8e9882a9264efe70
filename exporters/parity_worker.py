"""The process that compares Optimum's graph with PyTorch where the calling one has transformers 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gradmap_hub.exporters.onnx import measure


def main(checkpoint: str, graph: str) -> dict[str, Any]:
    """`graph`: the folder that `onnx.export_onnx` wrote. Returns the fields of a Parity."""
    return dataclasses.asdict(measure(Path(checkpoint), Path(graph)))
