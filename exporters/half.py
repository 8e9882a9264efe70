"""A float32 graph in float16, for GPUs: weights, activations and cache; logits stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(base: str, destination: str) -> list[str]:
    """Write the graph `base` in float16 to the file `destination`; returns the names of what was written. Which
    operators cannot take float16, and what is to be done about numbers beyond its range, is known to ONNX Runtime's own
    converter."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from gradmap_hub.exporters.graph import Graph

    model = onnx.load(base)
    # Shape inference would write the whole model out once more; the values' types are as they are in float32 graphs.
    # Its annotation says bool, its documentation also a list of names.
    kept: Any = ["logits"]
    converted = convert_float_to_float16(model, keep_io_types=kept, disable_shape_infer=True)
    return [file.name for file in Graph.of(converted, Path(base).parent).save(Path(destination))]
