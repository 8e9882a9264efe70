"""Perplexity of every ONNX file of the folder on ONNX Runtime, on the same sequences as the checkpoint's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmap_hub.data.rows import Rows
from gradmap_hub.evaluation.measurement import PRUNED, Context, Graph, Step
from gradmap_hub.evaluation.metrics import perplexity, ratio_interval
from gradmap_hub.evaluation.staleness import data_file
from gradmap_hub.evaluation.texts import Losses, rows_inputs, step_name
from gradmap_hub.layout import folder_sizes, sha256_of
from gradmap_hub.measurements import FilePerplexity, MeasuredFile
from gradmap_hub.progress import Reporter


def find_graphs(folder: Path, reporter: Reporter) -> list[Graph]:
    """The ONNX files of a folder; none, with a note, if ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        reporter.note("ONNX files are left out: ONNX Runtime is not installed (pip install 'gradmap-hub[cpu]').")
        return []
    from gradmap_hub.runtime import available_artifacts

    found: list[Graph] = []
    for artifact in available_artifacts(folder_sizes(folder)):
        data = data_file(folder / artifact.path)
        sums = sha256_of(folder / artifact.path), sha256_of(data) if data else ""
        found.append(Graph(artifact.path, artifact.bytes, *sums))
    return found


def steps(context: Context) -> list[Step[Losses]]:
    return [_losses(context, graph, rows) for graph in context.graphs for rows in context.texts]


def _step_name(graph: Graph, rows: Rows) -> str:
    return step_name(Path(graph.path).stem, rows)


def _losses(context: Context, graph: Graph, rows: Rows) -> Step[Losses]:
    def compute() -> Losses:
        from gradmap_hub import runtime

        model = runtime.load(context.folder, artifact=graph.path, context=context.config.seq_len)
        context.reporter.total(len(rows.ids))
        found: list[float] = []
        for row in rows.ids.tolist():
            found.append(float(model.losses(row).mean()))
            context.reporter.advance()
        return Losses(found)

    return Step(
        _step_name(graph, rows),
        f"{graph.path} on {rows.name}",
        Losses,
        compute,
        inputs={**rows_inputs(rows), "graph": [graph.sha256, graph.data_sha256]},
        describe=str,
    )


def result(context: Context, found: Mapping[str, Any]) -> list[MeasuredFile]:
    return [
        MeasuredFile(
            graph.path,
            graph.bytes,
            graph.sha256,
            graph.data_sha256,
            [
                _perplexity(rows.name, found[step_name(PRUNED, rows)].losses, found[_step_name(graph, rows)].rows)
                for rows in context.texts
            ],
        )
        for graph in context.graphs
    ]


def _perplexity(text: str, checkpoint: list[float], file: list[float]) -> FilePerplexity:
    return FilePerplexity(text, perplexity(file), ratio_interval(checkpoint, file))
