"""An ONNX model as nodes and weights. Reading does not hold the weights twice; models of 2 GB or more are written as a
graph file and a weight file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradmap_hub.files import usual_mode

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

Weight = npt.NDArray[np.generic]

# Protobuf messages must be below 2 GiB; the difference is room for the nodes.
SINGLE_FILE_LIMIT = 1_900_000_000
# Bytes. Shapes and other small constants stay in the graph file, where shape inference needs them.
_INLINE = 1024
# ONNX Runtime memory-maps a tensor only if it starts on a page boundary.
_ALIGNMENT = 4096


class Graph:
    """A graph. `model` has no weight data; `weights`: name -> initialiser, memory-mapped if it is external data."""

    def __init__(self, model: ModelProto, weights: dict[str, Weight]) -> None:
        self.model = model
        self.weights = weights

    @classmethod
    def load(cls, path: Path) -> Graph:
        import onnx

        return cls.of(onnx.load(path, load_external_data=False), path.parent)

    @classmethod
    def of(cls, model: ModelProto, folder: Path) -> Graph:
        """Wrap a model in memory and move its initialisers out of it. `folder`: the folder of its external data."""
        import onnx
        from onnx import numpy_helper

        weights: dict[str, Weight] = {}
        for tensor in model.graph.initializer:
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            weights[tensor.name] = _mapped(tensor, folder) if external else numpy_helper.to_array(tensor)
        del model.graph.initializer[:]
        return cls(model, weights)

    def save(self, path: Path, *, single_file_limit: int = SINGLE_FILE_LIMIT) -> list[Path]:
        """Write `path`, and `path`_data beside it if the weights exceed `single_file_limit` bytes; returns the files.
        Weights that no node uses are dropped."""
        import onnx
        from onnx import numpy_helper

        used = {name for node in self.model.graph.node for name in node.input}
        kept = {name: weight for name, weight in self.weights.items() if name in used}
        del self.model.graph.value_info[:]  # may describe values that no longer exist
        data_path = path.with_name(path.name + "_data")
        outside = sum(weight.nbytes for weight in kept.values()) > single_file_limit
        tensors: list[TensorProto] = []
        if not outside:
            tensors = [numpy_helper.from_array(np.ascontiguousarray(weight), name) for name, weight in kept.items()]
        else:
            with data_path.open("wb") as stream:
                for name, weight in kept.items():
                    if weight.nbytes <= _INLINE:
                        tensors.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
                        continue
                    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                    tensor = onnx.TensorProto(
                        name=name,
                        data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
                        dims=weight.shape,
                        data_location=onnx.TensorProto.EXTERNAL,
                    )
                    place = {"location": data_path.name, "offset": stream.tell(), "length": weight.nbytes}
                    for key, value in place.items():
                        tensor.external_data.add(key=key, value=str(value))
                    stream.write(np.ascontiguousarray(weight).view(np.uint8).data)
                    tensors.append(tensor)
        self.model.graph.initializer.extend(tensors)
        path.write_bytes(self.model.SerializeToString())
        del self.model.graph.initializer[:]
        written = [path, data_path] if outside else [path]
        for file in written:
            file.chmod(usual_mode())
        return written

    def producers(self) -> dict[str, int]:
        """Name of a value -> index of the node that produces it."""
        return {name: place for place, node in enumerate(self.model.graph.node) for name in node.output}

    def drop_unused_nodes(self) -> None:
        """Remove nodes that no output of the graph needs."""
        producers = self.producers()
        needed = [output.name for output in self.model.graph.output]
        kept: set[int] = set()
        while needed:
            place = producers.get(needed.pop())
            if place is not None and place not in kept:
                kept.add(place)
                needed.extend(self.model.graph.node[place].input)
        self.replace_nodes([node for place, node in enumerate(self.model.graph.node) if place in kept])

    def replace_nodes(self, nodes: list[NodeProto]) -> None:
        """Replace all nodes of the graph by `nodes`, in this order."""
        copies = [_copy(node) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)

    def use_runtime_operators(self) -> None:
        """Declare the operator set of ONNX Runtime's own operators (com.microsoft) if it is missing."""
        import onnx

        if all(entry.domain != "com.microsoft" for entry in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def main(source: str, destination: str) -> list[str]:
    """Copy the graph `source` to `destination` without unused weights; returns the names of the files."""
    return [path.name for path in Graph.load(Path(source)).save(Path(destination))]


def files_of(path: Path) -> list[Path]:
    """The existing files of a graph written by `Graph.save`: the graph and, if it has one, its weight file."""
    return [file for file in (path, path.with_name(path.name + "_data")) if file.is_file()]


def _copy(node: NodeProto) -> NodeProto:
    result = type(node)()
    result.CopyFrom(node)
    return result


def _mapped(tensor: TensorProto, folder: Path) -> Weight:
    import onnx

    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if 0 in shape:
        return np.zeros(shape, kind)
    return np.memmap(folder / place["location"], kind, "r", int(place.get("offset", 0)), shape)
