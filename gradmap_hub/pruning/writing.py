"""Write a pruned checkpoint from file to file, a few megabytes at a time, without a model in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.layout import WEIGHTS, WEIGHTS_INDEX
from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.expert_tensors import parts_of, split
from gradmap_hub.models.safetensors_files import clean_config
from gradmap_hub.models.skeleton import empty_model, named_tensors, transformers_config
from gradmap_hub.models.slicing import sliced_config
from gradmap_hub.models.weight_files import DTYPES, WeightFiles

# transformers' default: a checkpoint above 5 GB is split.
SHARD_BYTES = 5 * 10**9
# Elements that are read, converted and written at once.
_COPY_ELEMENTS = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `pieces()` yields its elements in order, in 1-d pieces of any dtype."""

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
    weights once. The pruned model's config determines the tensors and their shapes. Returns the number of parameters
    (tied weights once).

    Raises:
        BrokenCheckpointError: the source lacks a tensor, or one has another shape.
        OSError: the disk is full or not writable.
    """
    config = transformers_config(source)
    gone = set(removed)
    kept = [index for index in range(config.num_hidden_layers) if index not in gone]
    pruned = sliced_config(config, kept)
    files = WeightFiles(source)
    planned: list[PlannedTensor] = []
    used: set[tuple[int, str]] = set()
    files.expect(architecture, named_tensors(empty_model(config, dtype)))
    for name, parameter in named_tensors(empty_model(pruned, dtype)):
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
            raise BrokenCheckpointError(f"{original} has shape {shape}; the config requires {tuple(parameter.shape)}.")
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
    """Write tensors into model.safetensors or, above `shard_bytes`, into shards with an index.

    safetensors' own writer needs all tensors in memory. Weights already in `folder` are deleted first. Returns the
    number of elements.
    """
    # Files of an earlier run would be loaded, or counted, together with the new ones.
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
    """Write one safetensors file: the header's length (8 bytes), the header (JSON), the tensors' bytes in its order."""
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
        raise ValueError(f"{path.name} should hold {end} bytes of tensors; {written} were written")


def _planned(
    files: WeightFiles, architecture: Architecture, name: str, original: str, replacement: Tensor | None
) -> list[PlannedTensor]:
    """The tensors to write for the model's tensor `name`: as many as the checkpoint has for `original`."""
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
    """Write config.json as the model's `save_pretrained` would."""
    config.architectures = [architecture.causal_lm]
    config.dtype = dtype
    config._name_or_path = ""
    # The method has another name in transformers 4.57. It returns the fields that belong in generation_config.json.
    stray = getattr(config, "_get_generation_parameters", None) or config._get_non_default_generation_parameters
    for name in stray():
        setattr(config, name, None)
    config.save_pretrained(folder)
    clean_config(folder / "config.json")
