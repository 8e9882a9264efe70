"""Converts a float32 graph to float16 for GPUs: weights, activations and cache; logits stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(base: str, destination: str) -> list[str]:
    """Write the graph `base` in float16 to the file `destination`; returns the names of the files.

    ONNX Runtime's converter handles operators without float16 and values outside its range.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from gradmap_hub.exporters.graph import Graph

    model = onnx.load(base)
    # Shape inference would write the whole model to disk again, and the types of the float32 graph are sufficient.
    # keep_io_types is annotated as bool, but a list of names is documented too.
    kept: Any = ["logits"]
    converted = convert_float_to_float16(model, keep_io_types=kept, disable_shape_infer=True)
    return [file.name for file in Graph.of(converted, Path(base).parent).save(Path(destination))]
