"""The export formats: one row each."""

from __future__ import annotations

# Precision -> file of the graph, and the name of its format in a record. The Space begins with the first that it has:
# int8 is as good as float32 to the eye, a quarter of the download, and faster.
GRAPHS = {"int8": "model_int8.onnx", "float32": "model.onnx", "int4": "model_int4.onnx"}

FORMATS = {"int8": "int8", "float32": "onnx", "int4": "int4"}
