"""Prune a model of any depth with a few layers in memory: weights stay on disk, mapped, and are fetched layer by layer.

A `StreamedDecoder` is a `Decoder` whose model has its layers on the meta device. Entering `layer(index)` puts that
layer's weights in place, leaving it takes them away again. As long as a weight is used in the dtype it is stored in, it
is not even copied: it is a window on the page cache. In another dtype the layer is converted while it is in use, and
the embedding and the head, which are used at every pass, are converted piece by piece as they are read.
`write_pruned` copies the kept tensors from file to file, a few megabytes at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.layout import WEIGHTS, WEIGHTS_INDEX
from gradmap_hub.models.architectures import ARCHITECTURES, Architecture, sliced_config
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.models.expert_tensors import Parts, flat, parts_of, split, whole, whole_shape
from gradmap_hub.models.safetensors_files import clean_config, read_config, read_safetensors_header

# Bytes that `score_layers` may spend on the residual stream between layers, which decides how many rows it carries.
STREAM_BUDGET = 1 << 30
# transformers' default is the same 5 GB; a file that fits is not split.
SHARD_BYTES = 5 * 10**9
# Rows of the head that are converted at once when it is used in another dtype than it is stored in.
_HEAD_ROWS = 8192
# Elements that are read, converted and written at once.
_COPY_ELEMENTS = 1 << 24
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFiles:
    """The tensors of a safetensors checkpoint (one file, or shards with an index), mapped into memory read-only.

    The mapping is not writable on purpose: Linux counts a private writable one against memory in full, and refuses it
    when the file is larger than that. Nothing may write to these tensors in place; the process would be killed.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            BrokenCheckpointError: a file is missing or not whole, or a tensor is of a type that is not supported.
        """
        self.folder = folder
        self._entries: dict[str, tuple[Path, torch.dtype, tuple[int, ...], int]] = {}
        self._made: dict[str, Parts] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        if (folder / WEIGHTS).is_file():
            shards: dict[str, set[str] | None] = {WEIGHTS: None}
        else:
            shards = {}
            for tensor, shard in read_config(folder / WEIGHTS_INDEX)["weight_map"].items():
                names = shards.setdefault(shard, set())
                assert names is not None
                names.add(tensor)
        for shard, wanted in shards.items():
            self._read_header(folder / shard, wanted)

    def _read_header(self, path: Path, wanted: set[str] | None) -> None:
        """Note where the tensors `wanted` (None: all) of one file are."""
        if not path.is_file():
            raise BrokenCheckpointError(f"The shard {path.name} of the checkpoint is missing.")
        header = read_safetensors_header(path)
        with path.open("rb") as stream:
            start = 8 + struct.unpack("<Q", stream.read(8))[0]
        for name in header.keys() if wanted is None else wanted:
            if name not in header:
                raise BrokenCheckpointError(
                    f"{WEIGHTS_INDEX} names the tensor {name}, which {path.name} does not hold."
                )
            entry = header[name]
            if entry["dtype"] not in _DTYPES:
                raise BrokenCheckpointError(f"The tensor {name} is of type {entry['dtype']}, which cannot be pruned.")
            offset = start + entry["data_offsets"][0]
            self._entries[name] = (path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)

    def expect(self, architecture: Architecture, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Read the names of the checkpoint as those of the model, whose tensors are `wanted`: in older checkpoints the
        name of the part without the head is missing, and some tensors of the model are several in a checkpoint."""
        prefix = architecture.layers.partition(".")[0]
        if not any(name.startswith(f"{prefix}.") for name in self._entries):
            self._entries = {f"{prefix}.{name}": entry for name, entry in self._entries.items()}
        for name, tensor in wanted:
            parts = None if name in self._entries else parts_of(architecture, name, len(tensor))
            if parts is not None and all(part in self._entries for part in flat(parts)):
                self._made[name] = parts

    def parts(self, name: str) -> Parts | None:
        """The tensors of the checkpoint that make up one of the model; None if it is stored as it is."""
        return self._made.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._made

    def names(self) -> list[str]:
        used = {part for parts in self._made.values() for part in flat(parts)}
        return [*(name for name in self._entries if name not in used), *self._made]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._made:
            return whole_shape([[self.shape(part) for part in row] for row in self._made[name]])
        return self._entry(name)[2]

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(self._made[name][0][0] if name in self._made else name)[1]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored; where it is one in the checkpoint, a view of the file, never to be written to."""
        if name in self._made:
            return whole([[self.tensor(part) for part in row] for row in self._made[name]])
        path, dtype, shape, offset = self._entry(name)
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        mapped = self._mapped(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            if offset % dtype.itemsize:  # old writers did not align the header
                raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
                return raw.clone().view(dtype).view(shape)
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self, names: Iterable[str]) -> None:
        """Take the pages of these tensors out of this process. They stay in the page cache, and views stay valid."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name in names:
            if name in self._made:
                self.release(flat(self._made[name]))
                continue
            path, dtype, shape, offset = self._entry(name)
            if path in self._maps:
                # Whole pages only; the neighbours' bytes on the first page are simply read again.
                start = offset - offset % mmap.PAGESIZE
                length = offset + math.prod(shape) * dtype.itemsize - start
                if length > 0:
                    self._maps[path].madvise(mmap.MADV_DONTNEED, start, length)

    def _entry(self, name: str) -> tuple[Path, torch.dtype, tuple[int, ...], int]:
        if name not in self._entries:
            raise BrokenCheckpointError(f"The checkpoint in {self.folder} has no tensor {name}.")
        return self._entries[name]

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as stream:
                self._maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


class _ConvertingEmbedding(nn.Module):
    """An embedding table used in another dtype than it is stored in: only the rows looked up are converted."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self._dtype)


class _ConvertingHead(nn.Module):
    """A head without bias, used in the dtype of its input: its rows are converted a piece at a time."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return _ConvertingLinear.apply(hidden, self.weight)  # pyright: ignore


class _ConvertingLinear(torch.autograd.Function):
    """hidden (..., d) and weight (vocabulary, d) -> (..., vocabulary); the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        output = hidden.new_empty(*hidden.shape[:-1], len(weight))
        start = 0
        for rows in weight.split(_HEAD_ROWS):
            output[..., start : start + len(rows)] = F.linear(hidden, rows.to(hidden.dtype))
            start += len(rows)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        result = grad.new_zeros(*grad.shape[:-1], ctx.weight.shape[1])
        start = 0
        for rows in ctx.weight.split(_HEAD_ROWS):
            result += grad[..., start : start + len(rows)] @ rows.to(grad.dtype)
            start += len(rows)
        return result, None


@dataclass(frozen=True, eq=False)
class _Slot:
    """One parameter of a layer: its name within the layer and in the checkpoint, and the module it belongs to."""

    name: str
    tensor: str
    owner: nn.Module
    attribute: str
    empty: nn.Parameter


class StreamedDecoder(Decoder):
    """A decoder whose layers are fetched from disk when used. Made by `open_streamed`.

    A layer's parameters exist inside `layer(index)` only; outside, the module has parameters on the meta device.
    `put` and `replaced` are remembered and applied whenever the layer is fetched.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        tokens: int,
        files: WeightFiles,
        dtype: torch.dtype,
        rounding: torch.dtype | None,
    ) -> None:
        self.files = files
        self.dtype = dtype
        self._rounding = rounding
        self._depth: dict[int, int] = {}
        self._overrides: dict[tuple[int, str], Tensor] = {}
        layers: nn.ModuleList = model.get_submodule(architecture.layers)  # pyright: ignore
        self._slots = [_slots(layer, f"{architecture.layers}.{index}.") for index, layer in enumerate(layers)]
        super().__init__(model, architecture, tokens)

    @property
    def rows_per_pass(self) -> int:
        """As many rows as have their residual stream between all layers in 1 GiB: each pass fetches every layer."""
        width: int = self.model.config.hidden_size  # pyright: ignore
        row = (self.count + 1) * self.tokens * width * self.dtype.itemsize
        return max(1, STREAM_BUDGET // row)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The module of one layer with its weights, which are gone again when the outermost context is left."""
        depth = self._depth.get(index, 0)
        self._depth[index] = depth + 1
        try:
            if not depth:
                for slot in self._slots[index]:
                    _assign(slot, nn.Parameter(self.parameter(index, slot.name), requires_grad=False))
            yield self.layers[index]
        finally:
            self._depth[index] = depth
            if not depth:
                for slot in self._slots[index]:
                    _assign(slot, slot.empty)
                self.files.release(slot.tensor for slot in self._slots[index])

    def parameter(self, index: int, name: str) -> Tensor:
        """The present value of a layer's parameter in the decoder's dtype; not to be written to."""
        slot = self._slot(index, name)
        if (index, name) in self._overrides:
            return self._overrides[index, name]
        return self._converted(self.files.tensor(slot.tensor))

    def put(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Give parameters of a layer new values, for as long as this decoder lives. The files stay as they are."""
        for name, value in values.items():
            slot = self._slot(index, name)
            if value.shape != slot.empty.shape:
                raise ValueError(f"{slot.tensor} is {tuple(slot.empty.shape)}, not {tuple(value.shape)}")
            self._overrides[index, name] = self._converted(value.detach())
        self._refresh(index, values)

    @contextmanager
    def replaced(self, index: int, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Use other values for some parameters of a layer for a while. The decoder is as before afterwards."""
        before = {name: self._overrides.get((index, name)) for name in values}
        try:
            self.put(index, values)
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    self._overrides.pop((index, name), None)
                else:
                    self._overrides[index, name] = value
            self._refresh(index, values)

    def step(self, hidden: Tensor, index: int) -> Tensor:
        """Hidden states after one layer. Rows go through it one by one: one fetch, the activations of one row."""
        with self.layer(index) as module:
            return torch.cat([self._call(module, row, index) for row in hidden.split(1)])

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The model itself, callable as ever (with a KV cache, too): each layer is fetched when its turn comes."""

        def fetched(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.layer(index):
                    return forward(*args, **kwargs)

            return run

        for index, layer in enumerate(self.layers):
            layer.forward = fetched(index, layer.forward)
        try:
            yield self.model
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own again

    def _slot(self, index: int, name: str) -> _Slot:
        for slot in self._slots[index]:
            if slot.name == name:
                return slot
        raise AttributeError(f"layer {index} has no parameter {name!r}")

    def _refresh(self, index: int, names: Iterable[str]) -> None:
        """Bring the parameters of a layer that is in use up to date."""
        if self._depth.get(index, 0):
            for name in names:
                slot = self._slot(index, name)
                slot.owner.get_parameter(slot.attribute).data = self.parameter(index, name)

    def _converted(self, value: Tensor) -> Tensor:
        return (value if self._rounding is None else value.to(self._rounding)).to(self.dtype)


def open_streamed(
    folder: Path,
    architecture: Architecture,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    rounding: torch.dtype | None = None,
) -> StreamedDecoder:
    """The checkpoint in `folder` as a decoder for rows of `tokens` tokens, its layers left on disk.

    `dtype`: what it computes in; None: as the weights are stored. `rounding`: round all weights to this dtype first,
    as a checkpoint written in it would hold them.

    Raises:
        BrokenCheckpointError: a tensor is missing or of the wrong shape.
    """
    config = _config_of(folder)
    files = WeightFiles(folder)
    stored = files.dtype(next((name for name in files.names() if "embed" in name), files.names()[0]))
    dtype = dtype or stored
    model = _empty_model(config, dtype)
    files.expect(architecture, _named_tensors(model))
    missing, _, mismatched = _compared(model, files)
    if missing or mismatched:
        kind, name = ("no tensor", missing[0]) if missing else ("another shape of", mismatched[0])
        raise BrokenCheckpointError(f"The checkpoint in {folder} has {kind} {name}.")
    _load_outside(model, architecture, files, dtype, rounding)
    return StreamedDecoder(model, architecture, tokens, files, dtype, rounding)


def key_report(folder: Path) -> dict[str, list[str]]:
    """The checkpoint's tensors against what its config calls for, in the form of transformers' loading report.

    The files are opened by safetensors itself, so that a header only we understand is no pass.
    """
    from safetensors import safe_open

    model = _empty_model(_config_of(folder), torch.float32)
    files = WeightFiles(folder)
    files.expect(ARCHITECTURES[model.config.model_type], _named_tensors(model))
    missing, unexpected, mismatched = _compared(model, files)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                opened.get_slice(name).get_shape()
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def pruned_logits(decoder: Decoder, kept: Sequence[int], ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) float32 of one row `ids` (1, tokens) with only the layers `kept` active."""
    with torch.no_grad():
        hidden = decoder.run(decoder.embed(ids), kept)
        return decoder.head(decoder.norm(hidden))[0].float()


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `pieces()` yields its elements in order, in 1-d pieces of any dtype."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]


def write_pruned(
    source: Path,
    output: Path,
    architecture: Architecture,
    removed: Sequence[int],
    overrides: Mapping[tuple[int, str], Tensor],
    dtype: torch.dtype,
) -> int:
    """Write config.json and the safetensors of a checkpoint without the layers `removed`, from file to file.

    `overrides`: (original layer, parameter name within the layer) -> new value. Weights are stored in `dtype`, tied
    weights once. Which tensors are written, and their shapes, follows from the pruned model's config. Returns the
    number of parameters (tied weights once).

    Raises:
        BrokenCheckpointError: the source lacks a tensor, or one has another shape.
        OSError: no room on the disk, no permission.
    """
    config = _config_of(source)
    gone = set(removed)
    kept = [index for index in range(config.num_hidden_layers) if index not in gone]
    pruned = sliced_config(config, kept)
    files = WeightFiles(source)
    planned: list[PlannedTensor] = []
    used: set[tuple[int, str]] = set()
    files.expect(architecture, _named_tensors(_empty_model(config, dtype)))
    for name, parameter in _named_tensors(_empty_model(pruned, dtype)):
        original = name
        replacement = None
        if name.startswith(f"{architecture.layers}."):
            position, _, rest = name.removeprefix(f"{architecture.layers}.").partition(".")
            index = kept[int(position)]
            original = f"{architecture.layers}.{index}.{rest}"
            replacement = overrides.get((index, rest))
            used.add((index, rest))
        shape = files.shape(original) if replacement is None else tuple(replacement.shape)
        if shape != tuple(parameter.shape):
            raise BrokenCheckpointError(f"{original} is {shape}, where the config means {tuple(parameter.shape)}.")
        planned += _planned(files, architecture, name, original, replacement)
    unused = set(overrides) - used
    if unused:
        raise ValueError(f"no tensor is written for {sorted(unused)[0]}")
    output.mkdir(parents=True, exist_ok=True)
    count = write_safetensors(output, planned, dtype)
    _write_config(pruned, architecture, output, dtype)
    return count


def write_safetensors(
    folder: Path, planned: Sequence[PlannedTensor], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors into model.safetensors, or, where that would exceed `shard_bytes`, into shards with an index.

    safetensors' own writer wants all tensors in memory. Whatever weights are in `folder` are deleted first. Returns
    the number of elements.
    """
    # What an earlier run left would be read instead of, or counted with, the new weights.
    for path in (*folder.glob("*.safetensors"), folder / WEIGHTS_INDEX):
        path.unlink(missing_ok=True)
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        bytes_ = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dtype)
    count = sum(math.prod(tensor.shape) for tensor in planned)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": count, "total_size": count * dtype.itemsize},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return count


def _write_file(path: Path, tensors: Sequence[PlannedTensor], dtype: torch.dtype) -> None:
    """One safetensors file: the header's length (8 bytes), the header (JSON), the tensors' bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for piece in tensor.pieces():
                stream.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)
        written = stream.tell() - 8 - len(text)
    if written != end:
        raise ValueError(f"{path.name} should hold {end} bytes of tensors, {written} were given")


def _planned(
    files: WeightFiles, architecture: Architecture, name: str, original: str, replacement: Tensor | None
) -> list[PlannedTensor]:
    """What is written for the tensor `name` of the model: as many tensors as the checkpoint has for `original`."""
    parts = files.parts(original)
    if parts is None:
        shape = files.shape(original) if replacement is None else tuple(replacement.shape)
        return [PlannedTensor(name, shape, _pieces(files, original, replacement))]
    renamed = parts_of(architecture, name, len(parts))
    assert renamed is not None
    shapes = [[files.shape(part) for part in row] for row in parts]
    values = None if replacement is None else split(replacement, shapes)
    return [
        PlannedTensor(
            new, shapes[row][place], _pieces(files, parts[row][place], None if values is None else values[row][place])
        )
        for row, names in enumerate(renamed)
        for place, new in enumerate(names)
    ]


def _pieces(files: WeightFiles, name: str, replacement: Tensor | None) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        value = files.tensor(name) if replacement is None else replacement.detach().contiguous()
        yield from value.flatten().split(_COPY_ELEMENTS)
        if replacement is None:
            files.release([name])

    return pieces


def _write_config(config: Any, architecture: Architecture, folder: Path, dtype: torch.dtype) -> None:
    """config.json as `save_pretrained` of the model would write it."""
    config.architectures = [architecture.causal_lm]
    config.dtype = dtype
    config._name_or_path = ""
    # Named otherwise in transformers 4.57. What it returns belongs into generation_config.json.
    stray = getattr(config, "_get_generation_parameters", None) or config._get_non_default_generation_parameters
    for name in stray():
        setattr(config, name, None)
    config.save_pretrained(folder)
    clean_config(folder / "config.json")


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of a config with all parameters on the meta device and real buffers (rotary frequencies)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def _named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """What a checkpoint of the model holds: its state without weights that are tied to another."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]


def _compared(model: Any, files: WeightFiles) -> tuple[list[str], list[str], list[str]]:
    """Names of the tensors that are missing, not called for, and of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}
    missing = [name for name in wanted if name not in files]
    unexpected = [name for name in files.names() if name not in wanted]
    mismatched = [name for name in wanted if name in files and files.shape(name) != wanted[name]]
    return missing, unexpected, mismatched


def _load_outside(
    model: Any, architecture: Architecture, files: WeightFiles, dtype: torch.dtype, rounding: torch.dtype | None
) -> None:
    """Give the embedding, the final norm and the head their weights; tie the head where the config says so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    for name, empty in list(model.named_parameters()):
        if name.startswith(f"{architecture.layers}."):
            continue
        owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
        if tied and owner is head and name.endswith(".weight"):
            continue
        value = files.tensor(name)
        value = value if rounding is None else value.to(rounding)
        # These two are large, and converted where they are used.
        if owner not in (embedding, head) or _must_be_whole(owner):
            value = value.to(dtype)
        _assign(_Slot(name, name, owner, name.rpartition(".")[2], empty), nn.Parameter(value, requires_grad=False))
    if tied:
        head.weight = embedding.weight
    if embedding.weight.dtype != dtype:
        model.set_input_embeddings(_ConvertingEmbedding(embedding.weight, dtype))
    if head.weight.dtype != dtype:
        model.set_output_embeddings(_ConvertingHead(head.weight))


def _must_be_whole(module: nn.Module) -> bool:
    """Whether a module does more than the converting ones do."""
    return type(module) not in (nn.Embedding, nn.Linear) or getattr(module, "bias", None) is not None


def _slots(layer: nn.Module, prefix: str) -> list[_Slot]:
    result = []
    for name, parameter in layer.named_parameters():
        owner, _, attribute = name.rpartition(".")
        result.append(_Slot(name, prefix + name, layer.get_submodule(owner), attribute, parameter))
    return result


def _assign(slot: _Slot, parameter: nn.Parameter) -> None:
    # Not setattr: what is put there must be this very object, whatever hooks on registration are about.
    slot.owner._parameters[slot.attribute] = parameter
