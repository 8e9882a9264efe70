"""The header of a GGUF file: read once, within limits, before anything else sees the file.

A GGUF file is untrusted: each length and count in it is compared with the size of the file and with a limit before it
is used.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmap_hub.errors import BrokenCheckpointError, SourceError

# Vocabulary and merges of the largest known models take 10 MB.
HEADER_LIMIT = 1 << 25
# The largest known model has 1,200 tensors, or 20,000 with one tensor per expert.
TENSOR_LIMIT = 1 << 16
# Known files have about 40.
KEY_LIMIT = 1 << 12
# The longest known lists have 515,000 merges; vocabularies have up to 262,144 tokens, with three lists each.
ARRAY_LIMIT = 1 << 19
ELEMENT_LIMIT = 1 << 21
# Chat templates and licence texts have up to 100 kB.
STRING_LIMIT = 1 << 20
# The format allows 65,535 bytes for a key and 64 for the name of a tensor.
NAME_LIMIT = 256
ALIGNMENT_LIMIT = 1 << 16

# A hint for files that are not supported.
USE_ORIGINAL = "Use the model's safetensors files instead: a Hub id, or a folder."
_STRING, _ARRAY = 8, 9
# Type number in the file -> format of `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NAME = re.compile(r"[A-Za-z0-9_.\-/]+", re.ASCII)
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_\-]{0,63}", re.ASCII)
_AGAIN = "Fetch it again, or use the model's safetensors files."


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file. `shape` as in PyTorch, the slowest dimension first; `kind`: a value of
    GGMLQuantizationType; `start`: offset in the file; `bytes`: size in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of the GGUF file at `path`. The data of every tensor is within the file.

    The methods `integer` to `entries` return the value of a metadata key. They raise BrokenCheckpointError if the key
    is missing and has no `default`, or its value has another type or is out of range.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number from `low` to `high`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def entries(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of values of type `kind`; of `count` entries, if given."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
            raise self.wrong(key, f"a list of {kind.__name__}")
        if count is not None and len(value) != count:
            raise self.wrong(key, f"a list of {count:,}")
        return value

    def broken(self, reason: str) -> BrokenCheckpointError:
        """The error that names the file and what is wrong with it."""
        return BrokenCheckpointError(f"{self.path.name}: {reason}.", hint=_AGAIN)

    def not_known(self, what: str) -> SourceError:
        """The error that names what is not supported."""
        return SourceError(
            f"{self.path.name} has {what}, which is not supported for the architecture {self.architecture!r}.",
            hint=USE_ORIGINAL,
        )

    def wrong(self, key: str, expected: str) -> BrokenCheckpointError:
        """The error that names a key, its value and what is expected instead."""
        if key not in self.metadata:
            found = "missing"
        elif isinstance(value := self.metadata[key], list):
            found = f"a list of {len(value):,}"
        else:
            found = repr(value if not isinstance(value, str) else value[:60])
        return self.broken(f"{key} is {found}; {expected} is expected")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table of a GGUF file. No tensor is read.

    Raises:
        SourceError: the file does not exist.
        BrokenCheckpointError: it is not a GGUF file, truncated, one part of several, or exceeds a limit of this module.
    """
    if not path.is_file():
        raise SourceError(f"No such file: {path}", hint="Give a Hub id, a folder or a .gguf file.")
    with path.open("rb") as stream:
        data = stream.read(HEADER_LIMIT)
    try:
        return _Reader(path, data, path.stat().st_size).header()
    except ValueError as error:
        raise BrokenCheckpointError(f"{path.name} is not a readable GGUF file: {error}.", hint=_AGAIN) from error


class _Reader:
    """Reads the header from `data`, the start of a file of `size` bytes. Raises ValueError with the reason to refuse
    it."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._place = 0
        self._elements = 0

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError("it is big-endian" if version & 0xFFFF == 0 else f"its version is {version}, not 2 or 3")
        tensor_count = self._count("tensors", TENSOR_LIMIT)
        key_count = self._count("metadata keys", KEY_LIMIT)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._name("key")
            if key in metadata:
                raise ValueError(f"the key {key} occurs twice")
            metadata[key] = self._value(key, self._scalar("I"))
        self._refuse_parts(metadata)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
            found = "missing" if architecture is None else repr(architecture)[:80]
            raise ValueError(f"general.architecture is {found}, not the name of an architecture")
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        return GgufHeader(self._path, architecture, metadata, self._placed(entries, metadata))

    def _refuse_parts(self, metadata: Mapping[str, Any]) -> None:
        if metadata.get("split.count", 1) not in (0, 1):
            raise BrokenCheckpointError(
                f"{self._path.name} is one part of a model that is split into {metadata['split.count']!r} files.",
                hint="Merge them with llama.cpp's `llama-gguf-split --merge`, or use the model's safetensors files.",
            )

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, kind and offset in the data."""
        name = self._name("tensor")
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"the tensor {name} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        return name, tuple(reversed(shape)), self._scalar("I"), self._scalar("Q")

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, GgufTensor]:
        """The tensors with their offsets in the file, by name."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= ALIGNMENT_LIMIT or alignment & (alignment - 1):
            raise ValueError("general.alignment is not a power of two")
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"the tensor {name} occurs twice")
            if kind not in sizes:
                raise ValueError(f"the tensor {name} has the unknown type {kind}")
            block, width = sizes[kind]
            count = math.prod(shape)
            if count == 0 or shape[-1] % block:
                raise ValueError(
                    f"the tensor {name} of shape {list(shape)} cannot be stored as {GGMLQuantizationType(kind).name}"
                )
            size = count // block * width
            if offset % alignment or start + offset + size > self._size:
                raise ValueError(f"the tensor {name} ends beyond the file, which is truncated or damaged")
            tensors[name] = GgufTensor(name, shape, kind, start + offset, size)
        return tensors

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key}", STRING_LIMIT)
        if kind == _ARRAY:
            return self._array(key, self._scalar("I"))
        if kind not in _SCALARS:
            raise ValueError(f"{key} has the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, key: str, kind: int) -> list[Any]:
        count = self._count(f"entries of {key}", ARRAY_LIMIT)
        self._elements += count
        if self._elements > ELEMENT_LIMIT:
            raise ValueError(f"its lists have more than {ELEMENT_LIMIT:,} entries together")
        if kind == _STRING:
            return [self._string(f"an entry of {key}", STRING_LIMIT) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{key} is a list of lists" if kind == _ARRAY else f"{key} has the unknown type {kind}")
        form = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _count(self, what: str, limit: int) -> int:
        count = self._scalar("Q")
        if count > limit:
            raise ValueError(f"the number of {what} is {count:,}; at most {limit:,} are read")
        return count

    def _name(self, what: str) -> str:
        name = self._string(f"the name of a {what}", NAME_LIMIT)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is not the name of a {what}")
        return name

    def _string(self, what: str, limit: int) -> str:
        length = self._scalar("Q")
        if length > limit:
            raise ValueError(f"{what} has {length:,} bytes; at most {limit:,} are read")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def _scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _take(self, count: int) -> bytes:
        start, self._place = self._place, self._place + count
        if self._place > len(self._data):
            if len(self._data) < self._size:
                raise ValueError(f"its header is longer than {HEADER_LIMIT:,} bytes")
            raise ValueError("it ends within its header")
        return self._data[start : self._place]
