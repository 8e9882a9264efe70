"""The measurements of `evaluate`, in the order in which they run on each model."""

from __future__ import annotations

from gradmap_hub.evaluation import costs, onnx_files, samples, task_scores, texts
from gradmap_hub.evaluation.measurement import Measurement

MEASUREMENTS = [
    Measurement("texts", texts.steps, texts.result),
    Measurement("samples", samples.steps, samples.result),
    Measurement("tasks", task_scores.steps, task_scores.result),
    Measurement("files", onnx_files.steps, onnx_files.result),
    Measurement("speed", costs.steps, costs.result),
]
