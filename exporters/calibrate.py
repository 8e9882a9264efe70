"""E[x x^T] of the input x of every matrix product of a graph, measured on token sequences; GPTQ rounding needs it.

The graph runs with these inputs as additional outputs, a few at a time, so that the matrices fit in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradmap_hub.exporters.quantized import find_linears

if TYPE_CHECKING:
    from gradmap_hub.exporters.graph import Graph

INDEX = "index.json"
# Bytes of matrices in memory at once, and on disk in total. Above DISK_LIMIT, rounding does without them.
_MEMORY = 1 << 30
DISK_LIMIT = 8 << 30


def main(base: str, rows: str, destination: str, head_size: int) -> bool:
    """Measure the graph `base` on `rows` (an .npy file, int64 (rows, tokens)) and write to the folder `destination`.
    `head_size`: width of keys and values, for graphs that do not state it.

    Returns False and writes nothing if the matrices would exceed DISK_LIMIT bytes.
    """
    from gradmap_hub.exporters.graph import Graph

    graph = Graph.load(Path(base))
    widths = {entry.input: entry.inputs for entry in find_linears(graph) if entry.layer is not None}
    if sum(4 * width * width for width in widths.values()) > DISK_LIMIT:
        return False
    ids = np.load(rows)
    folder = Path(destination)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for group in _groups(widths):
        for value, moment in _measure(graph, Path(base), group, widths, ids, head_size).items():
            index[value] = f"{len(index)}.npy"
            np.save(folder / index[value], moment)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return True


def read_index(folder: Path) -> dict[str, Path]:
    """Name of an input -> file of its matrix (width, width) float32."""
    return {value: folder / name for value, name in json.loads((folder / INDEX).read_text(encoding="utf-8")).items()}


def _groups(widths: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for value, width in widths.items():
        size = 4 * width * width
        if group and held + size > _MEMORY:
            yield group
            group, held = [], 0
        group.append(value)
        held += size
    if group:
        yield group


def _measure(
    graph: Graph, base: Path, values: Sequence[str], widths: dict[str, int], ids: npt.NDArray[np.int64], head_size: int
) -> dict[str, npt.NDArray[np.float32]]:
    import onnx

    from gradmap_hub.exporters.session import Session

    model = onnx.load(base, load_external_data=False)
    declared = {output.name for output in model.graph.output}
    for value in values:
        if value not in declared:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    # In the folder of the base, where its external data is.
    with tempfile.NamedTemporaryFile(dir=base.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        del model
        session = Session(Path(file.name), head_size)
        moments = {value: np.zeros((widths[value], widths[value]), np.float32) for value in values}
        tokens = 0
        for row in ids:
            for value, found in session.extras(row[None]).items():
                flat = found.reshape(-1, found.shape[-1])
                moments[value] += flat.T @ flat
            tokens += ids.shape[1]
    return {value: moment / np.float32(max(tokens, 1)) for value, moment in moments.items()}
