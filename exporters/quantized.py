"""Weight-only int8 and int4 for text-generation graphs: MatMul becomes MatMulNBits, the token embedding looks up codes,
activations stay float32.

Tied embedding and head share one tensor of codes. The graph may be GenAI's or Optimum's: the code looks for products
with a constant matrix, stored directly or transposed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradmap_hub.exporters.blockwise import Blocks, block_sums, gptq, nearest, regridded, search
from gradmap_hub.exporters.graph import Graph
from gradmap_hub.exporters.recipes import GATES_ONLY, GPTQ, LEAST_BLOCK, MIXED, NEAREST, NONE, REGRID, SEARCH, Recipe

if TYPE_CHECKING:
    from onnx import NodeProto

# Activations enter the product as int8, block by block: the fast kernel on recent CPUs.
_ACCURACY_LEVEL = 4
_LAYER = re.compile(r"layers\.(\d+)/.*?(\w+?)_proj")
_SENSITIVE_ROLES = ("qkv", "v", "down")
_GATE_ROLES = ("gate", "up", "gate_up")
# If a larger share of the weights needs 8 bits, the model does not come from 4-bit quantisation.
_LARGEST_REST = 0.5
# The code of 0 in 8 bits, where no zeros are stored.
_MIDDLE_CODE = 128
# Matrices with fewer weights are not quantised.
_LEAST_WEIGHTS = 1024


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix: node index `place`, initialiser `weight`, stored (outputs, inputs) if
    `rows_out`. `layer` and `role` ("down", "qkv", ...) come from the node's name; the head has role "head" and layer
    None."""

    place: int
    name: str
    input: str
    weight: str
    rows_out: bool
    outputs: int
    inputs: int
    layer: int | None
    role: str

    @property
    def size(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Lookup:
    """The token embedding: a Gather of rows of the initialiser `weight`, stored (vocabulary, width) if `rows_out`."""

    place: int
    weight: str
    rows_out: bool
    width: int


@dataclass(frozen=True)
class Stored:
    """Codes stored in the graph. `inputs`: of the quantised product; more than the matrix has if it was regridded."""

    bits: int
    block: int
    inputs: int
    has_zeros: bool


@dataclass(frozen=True)
class Quantised:
    """What was quantised. `linears`: number of products; `eight_bit`: names of those with 8 bits where the others have
    4; `rounding`: the rounding that was used."""

    files: list[str]
    bytes: int
    linears: int
    eight_bit: list[str]
    rounding: str


def main(base: str, destination: str, recipe: dict[str, Any], hessians: str | None = None) -> dict[str, Any] | None:
    """Quantise the graph `base` into the file `destination`. `hessians`: a folder written by `calibrate`.

    Returns the fields of a `Quantised`; returns None and writes nothing if the recipe does not apply to these weights.
    """
    moments = Path(hessians) if hessians else None
    done = quantise(Path(base), Path(destination), Recipe(**recipe), moments)
    return None if done is None else dataclasses.asdict(done)


def quantise(base: Path, destination: Path, recipe: Recipe, hessians: Path | None) -> Quantised | None:
    """See `main`. Products whose number of inputs is not a multiple of the smallest block are not quantised."""
    graph = Graph.load(base)
    linears = [entry for entry in find_linears(graph) if _block_of(entry.inputs, recipe)]
    moments = _Moments(hessians) if hessians else None
    rounding = SEARCH if recipe.rounding == GPTQ and moments is None else recipe.rounding
    chosen = _eight_bit(linears, recipe)
    nodes: list[NodeProto] = list(graph.model.graph.node)
    replaced: dict[int, list[NodeProto]] = {}
    stored: dict[str, Stored] = {}
    summed: set[str] = set()
    for entry in linears:
        if entry.weight not in stored:
            blocks, eight_bit = _blocks_of(graph, entry, recipe, moments, eight_bit=entry.name in chosen)
            stored[entry.weight] = _store(graph, entry.weight, blocks)
            if eight_bit:
                chosen.add(entry.name)
        before = []
        if stored[entry.weight].inputs > entry.inputs and entry.input not in summed:
            before = _with_sums(graph, entry, stored[entry.weight].block)
            summed.add(entry.input)
        replaced[entry.place] = [*before, _product(nodes[entry.place], entry, stored[entry.weight])]
    if recipe.rounding == REGRID and _share(linears, chosen) > _LARGEST_REST:
        return None
    for lookup in find_lookups(graph):
        block = _block_of(lookup.width, recipe)
        if not block:
            continue
        if lookup.weight not in stored:
            weight = _matrix(graph, lookup.weight, lookup.rows_out)
            blocks = nearest(weight, recipe.head_bits, block, symmetric=True)
            stored[lookup.weight] = _store(graph, lookup.weight, blocks)
        node = nodes[lookup.place]
        replaced[lookup.place] = list(_gathered(graph, node, lookup, stored[lookup.weight]))
    graph.replace_nodes([new for place, node in enumerate(nodes) for new in replaced.get(place, [node])])
    graph.drop_unused_nodes()
    graph.use_runtime_operators()
    files = graph.save(destination)
    size = sum(file.stat().st_size for file in files)
    return Quantised([file.name for file in files], size, len(linears), sorted(chosen), rounding)


def _block_of(inputs: int, recipe: Recipe) -> int:
    """The recipe's block, or its largest half, quarter, ... that divides `inputs`; 0 if no block of 16 or more does."""
    block = recipe.block
    while block >= LEAST_BLOCK and inputs % block:
        block //= 2
    return block if block >= LEAST_BLOCK else 0


def find_linears(graph: Graph) -> list[Linear]:
    """Products with a constant matrix that is large enough to quantise."""
    return list(_linears(graph))


def _linears(graph: Graph) -> Iterator[Linear]:
    producers = graph.producers()
    nodes = graph.model.graph.node
    embedded = {lookup.weight for lookup in find_lookups(graph)}
    for place, node in enumerate(nodes):
        if node.op_type != "MatMul":
            continue
        found = _constant(graph, producers, node.input[1])
        if found is None:
            continue
        weight, transposed = found
        rows, columns = graph.weights[weight].shape
        outputs, inputs = (rows, columns) if transposed else (columns, rows)
        if outputs * inputs < _LEAST_WEIGHTS:
            continue
        match = _LAYER.search(node.name)
        head = weight in embedded or "lm_head" in node.name
        yield Linear(
            place, node.name, node.input[0], weight, transposed, outputs, inputs,
            int(match[1]) if match and not head else None,
            "head" if head else match[2] if match else "",
        )  # fmt: skip


def find_lookups(graph: Graph) -> list[Lookup]:
    """Gather nodes that look up rows of a constant matrix by input_ids."""
    producers = graph.producers()
    found: list[Lookup] = []
    for place, node in enumerate(graph.model.graph.node):
        if node.op_type != "Gather" or node.input[1] != "input_ids":
            continue
        constant = _constant(graph, producers, node.input[0])
        if constant is not None:
            weight, transposed = constant
            shape = graph.weights[weight].shape
            found.append(Lookup(place, weight, not transposed, shape[0] if transposed else shape[1]))
    return found


def _constant(graph: Graph, producers: Mapping[str, int], value: str) -> tuple[str, bool] | None:
    """The two-dimensional initialiser that `value` comes from, and whether it is transposed."""
    transposed = False
    place = producers.get(value)
    if place is not None:
        node = graph.model.graph.node[place]
        permutation = [list(entry.ints) for entry in node.attribute if entry.name == "perm"]
        if node.op_type != "Transpose" or permutation not in ([], [[1, 0]]):
            return None
        value, transposed = node.input[0], True
    weight = graph.weights.get(value)
    if weight is None or weight.ndim != 2 or not np.issubdtype(weight.dtype, np.floating):
        return None
    return value, transposed


def _matrix(graph: Graph, name: str, rows_out: bool) -> npt.NDArray[np.float32]:
    weight = graph.weights[name]
    return np.ascontiguousarray(weight if rows_out else weight.T, np.float32)


def _blocks_of(
    graph: Graph, entry: Linear, recipe: Recipe, moments: _Moments | None, *, eight_bit: bool
) -> tuple[Blocks, bool]:
    """The codes of a matrix, and whether it has 8 bits where others have 4."""
    weight, block = _matrix(graph, entry.weight, entry.rows_out), _block_of(entry.inputs, recipe)
    if entry.role == "head" and recipe.head_bits != recipe.bits:
        return nearest(weight, recipe.head_bits, block, symmetric=True), False
    if recipe.rounding == REGRID:
        blocks = regridded(weight, block)
        return (nearest(weight, 8, block, symmetric=True), True) if blocks is None else (blocks, False)
    if eight_bit:
        return nearest(weight, 8, block, symmetric=True), True
    if recipe.rounding == NEAREST:
        return nearest(weight, recipe.bits, block, recipe.symmetric), False
    hessian = moments.of(entry.input) if moments is not None else None
    if recipe.rounding == GPTQ and hessian is not None:
        return gptq(weight, hessian, recipe.bits, block, recipe.symmetric), False
    importance = None if hessian is None else np.diag(hessian).astype(np.float32)
    return search(weight, recipe.bits, block, recipe.symmetric, importance), False


def _share(linears: Sequence[Linear], chosen: set[str]) -> float:
    """The share of the layers' weights that is in 8 bits."""
    inner = [entry for entry in linears if entry.role != "head"]
    return sum(entry.size for entry in inner if entry.name in chosen) / max(sum(entry.size for entry in inner), 1)


def _eight_bit(linears: Sequence[Linear], recipe: Recipe) -> set[str]:
    """The names of the matrices that an int4 recipe keeps in 8 bits."""
    inner = [entry for entry in linears if entry.layer is not None]
    if recipe.bits == 8 or recipe.eight_bit == NONE or not inner:
        return set()
    if recipe.eight_bit == GATES_ONLY:
        return {entry.name for entry in inner if entry.role not in _GATE_ROLES}
    assert recipe.eight_bit == MIXED
    count = 1 + max(entry.layer for entry in inner if entry.layer is not None)
    layers = {layer for layer in range(count) if _is_mixed(layer, count)}
    return {entry.name for entry in inner if entry.layer in layers and entry.role in _SENSITIVE_ROLES}


def _is_mixed(layer: int, count: int) -> bool:
    """llama.cpp's rule for layers whose value and down projections get more bits."""
    return layer < count / 8 or layer >= 7 * count / 8 or (layer - round(count / 8)) % 3 == 2


def _store(graph: Graph, name: str, blocks: Blocks) -> Stored:
    graph.weights[name + ".codes"] = blocks.packed_codes()
    graph.weights[name + ".scales"] = blocks.scales
    zeros = blocks.packed_zeros()
    if zeros is not None:
        graph.weights[name + ".zeros"] = zeros
    count, block = blocks.codes.shape[1:]
    return Stored(blocks.bits, block, count * block, zeros is not None)


def _with_sums(graph: Graph, entry: Linear, block: int) -> list[NodeProto]:
    """Nodes that append the block sums to the input: (batch, tokens, inputs + further columns)."""
    from onnx import helper

    sums = f"gradmap.block_sums_{entry.inputs}"
    graph.weights.setdefault(sums, block_sums(entry.inputs, block))
    value = entry.input
    return [
        helper.make_node("MatMul", [value, sums], [value + ".sums"], name=value + "/sums"),
        helper.make_node("Concat", [value, value + ".sums"], [value + ".summed"], name=value + "/summed", axis=-1),
    ]


def _product(node: NodeProto, entry: Linear, stored: Stored) -> NodeProto:
    from onnx import helper

    value = entry.input + ".summed" if stored.inputs > entry.inputs else entry.input
    inputs = [value, entry.weight + ".codes", entry.weight + ".scales"]
    if stored.has_zeros:
        inputs.append(entry.weight + ".zeros")
    return helper.make_node(
        "MatMulNBits",
        inputs,
        list(node.output),
        name=f"{node.name}_NBits",
        domain="com.microsoft",
        K=stored.inputs,
        N=entry.outputs,
        bits=stored.bits,
        block_size=stored.block,
        accuracy_level=_ACCURACY_LEVEL,
    )


def _gathered(graph: Graph, node: NodeProto, lookup: Lookup, stored: Stored) -> Iterator[NodeProto]:
    """Nodes of the embedding: rows of the codes (vocabulary, blocks, block), gathered and multiplied by their scales.
    The codes keep the shape that MatMulNBits needs, so that a tied head uses the same tensor.

    GatherBlockQuantized would be one node; the builds of onnxruntime-web that browsers load by default lack it. The
    result has the same bits."""
    from onnx import TensorProto, helper

    if stored.bits != 8:
        raise ValueError("the codes of an embedding are bytes")
    weight, ids, name = lookup.weight, node.input[1], node.output[0]
    count = lookup.width // stored.block
    vocabulary = graph.weights[weight + ".codes"].shape[0]
    graph.weights["gradmap.scales_shape"] = np.array([vocabulary, count, 1], np.int64)
    graph.weights["gradmap.embedding_shape"] = np.array([0, 0, lookup.width], np.int64)

    def rows(part: str) -> Iterator[NodeProto]:
        """The values of `part` for the tokens: (batch, tokens, blocks, block or 1), float32."""
        table = f"{weight}.{part}"
        if part != "codes":
            yield helper.make_node("Reshape", [table, "gradmap.scales_shape"], [table + "3"], name=f"{name}_{part}3")
            table += "3"
        gathered = f"{name}_{part}"
        if part == "scales":
            yield helper.make_node("Gather", [table, ids], [gathered], name=gathered, axis=0)
            return
        yield helper.make_node("Gather", [table, ids], [gathered + "_bytes"], name=gathered + "_bytes", axis=0)
        yield helper.make_node("Cast", [gathered + "_bytes"], [gathered], name=gathered, to=TensorProto.FLOAT)

    zero = "gradmap.zero_code"
    if stored.has_zeros:
        yield from rows("zeros")
        zero = f"{name}_zeros"
    else:
        graph.weights[zero] = np.array(_MIDDLE_CODE, np.float32)
    yield from rows("codes")
    yield from rows("scales")
    yield helper.make_node("Sub", [f"{name}_codes", zero], [name + "_centred"], name=name + "_centred")
    yield helper.make_node("Mul", [name + "_centred", f"{name}_scales"], [name + "_blocks"], name=name + "_blocks")
    yield helper.make_node("Reshape", [name + "_blocks", "gradmap.embedding_shape"], [name], name=name + "_rows")


class _Moments:
    """E[x x^T] (inputs, inputs) of the inputs of products, one file each (see calibrate.py)."""

    def __init__(self, folder: Path) -> None:
        from gradmap_hub.exporters.calibrate import read_index

        self._files = read_index(folder)

    def of(self, value: str) -> npt.NDArray[np.float32] | None:
        path = self._files.get(value)
        return None if path is None else np.load(path)
