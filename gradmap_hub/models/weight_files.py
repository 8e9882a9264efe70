"""The tensors of a safetensors checkpoint, mapped into memory read-only."""

from __future__ import annotations

import math
import mmap
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.layout import WEIGHTS, WEIGHTS_INDEX
from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.expert_tensors import Parts, flat, parts_of, whole, whole_shape
from gradmap_hub.models.safetensors_files import read_safetensors_header, read_weight_map

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dtypes of masks and positions, which older checkpoints store and no model reads.
_OTHER_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class WeightFiles:
    """The tensors of a safetensors checkpoint (one file, or shards with an index), mapped into memory read-only.

    Linux counts a private writable mapping against memory in full and refuses it for files larger than memory;
    therefore the mapping is read-only. A write to these tensors would kill the process.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            BrokenCheckpointError: a file is missing or damaged, or a tensor has an unsupported dtype.
        """
        self.folder = folder
        self._entries: dict[str, tuple[Path, torch.dtype, tuple[int, ...], int]] = {}
        self._made: dict[str, Parts] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        if (folder / WEIGHTS).is_file():
            shards: dict[str, set[str] | None] = {WEIGHTS: None}
        else:
            shards = {}
            for tensor, shard in read_weight_map(folder / WEIGHTS_INDEX).items():
                names = shards.setdefault(shard, set())
                assert names is not None
                names.add(tensor)
        for shard, wanted in shards.items():
            self._read_header(folder / shard, wanted)

    def _read_header(self, path: Path, wanted: set[str] | None) -> None:
        """Record the positions of the tensors `wanted` (None: all) of one file."""
        if not path.is_file():
            raise BrokenCheckpointError(f"The shard {path.name} of the checkpoint is missing.")
        header = read_safetensors_header(path)
        with path.open("rb") as stream:
            start = 8 + struct.unpack("<Q", stream.read(8))[0]
        for name in header.keys() if wanted is None else wanted:
            if name not in header:
                raise BrokenCheckpointError(
                    f"{WEIGHTS_INDEX} names the tensor {name}, which {path.name} does not contain."
                )
            entry = header[name]
            dtype = (DTYPES | _OTHER_DTYPES).get(entry["dtype"])
            if dtype is None:
                raise BrokenCheckpointError(f"The tensor {name} has dtype {entry['dtype']}, which is not supported.")
            offset = start + entry["data_offsets"][0]
            self._entries[name] = (path, dtype, tuple(entry["shape"]), offset)

    def expect(self, architecture: Architecture, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Map the tensor names of the checkpoint to those of the model, whose tensors are `wanted`: some older
        checkpoints lack the base model's prefix, and some split tensors (see `expert_tensors`)."""
        prefix = architecture.layers.partition(".")[0]
        if not any(name.startswith(f"{prefix}.") for name in self._entries):
            self._entries = {f"{prefix}.{name}": entry for name, entry in self._entries.items()}
        for name, tensor in wanted:
            parts = None if name in self._entries else parts_of(architecture, name, len(tensor))
            if parts is not None and all(part in self._entries for part in flat(parts)):
                self._made[name] = parts

    def compare(self, wanted: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[str], list[str]]:
        """Names of the missing, unexpected and mismatched tensors, compared with those of a model."""
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted}
        missing = [name for name in shapes if name not in self]
        unexpected = [name for name in self.names() if name not in shapes]
        mismatched = [name for name in shapes if name in self and self.shape(name) != shapes[name]]
        return missing, unexpected, mismatched

    def first_not_finite(self, names: Iterable[str]) -> str | None:
        """The name of the first of these tensors that contains NaN or infinity; None if all are finite. Each is read
        once and not kept in memory."""
        for name in names:
            for stored in flat(self._made[name]) if name in self._made else [name]:
                value = self.tensor(stored)
                # aminmax propagates NaN and takes no memory.
                finite = not value.numel() or all(math.isfinite(bound) for bound in torch.aminmax(value))
                del value
                self.release([stored])
                if not finite:
                    return stored
        return None

    def parts(self, name: str) -> Parts | None:
        """The names in the checkpoint of a split or renamed tensor; None for all others."""
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
        """A tensor in its stored dtype: a read-only view of the file, or a new tensor if the checkpoint splits it."""
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
        """Drop the pages of these tensors from this process. They stay in the page cache, and views stay valid."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name in names:
            if name in self._made:
                self.release(flat(self._made[name]))
                continue
            path, dtype, shape, offset = self._entry(name)
            if path in self._maps:
                # Whole pages: other tensors' bytes on the first page are read again when needed.
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
