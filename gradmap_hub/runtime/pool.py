"""A shared KV cache for several texts, so that one run of the graph decodes a token of each.

For graphs with GroupQueryAttention on a CPU, which write keys and values into the buffers they read. Every layer has
one buffer (rows, heads, capacity, head size) with one row per text. The rows in use are always the first ones, so one
step covers them all, whatever their lengths. A step reads every weight once instead of once per text, and each text
gets the same logits as on its own.

The operating system commits memory on first write, so a row costs only what its text has filled. NumPy requests pages
of 2 MB for large arrays, with which a short text would take nearly the memory of a full one; these buffers use 4 KB.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradmap_hub.runtime.prefixes import KeysValues, tokens_of, write_into

if TYPE_CHECKING:
    import onnxruntime as ort

    from gradmap_hub.runtime.session import Session


class RowPool:
    """KV cache for `rows` texts of at most `capacity` tokens each. Not thread-safe."""

    def __init__(self, session: Session, rows: int, capacity: int) -> None:
        self._session = session
        self._most = rows
        self._capacity = capacity
        self._rows: list[Row] = []
        self._buffers: dict[str, np.ndarray] = {}
        self._memory: dict[str, mmap.mmap] = {}

    def take(self) -> Row:
        """Return an empty row for a new text; `Row.close` returns it to the pool.

        Raises:
            IndexError: all rows are in use.
        """
        if len(self._rows) >= self._most:
            raise IndexError(f"all {self._most} rows are in use")
        if not self._rows:
            session = self._session
            for name, (_, dtype) in session.past.items():
                shape = session.cache_shape(name, self._most, self._capacity)
                self._memory[name] = memory = _reserve(math.prod(shape) * np.dtype(dtype).itemsize)
                self._buffers[name] = np.frombuffer(memory, dtype).reshape(shape)
        self._rows.append(Row(self, len(self._rows)))
        return self._rows[-1]

    def write(self, wanted: Sequence[Row], token_ids: Sequence[int]) -> np.ndarray:
        """Append one token to each of these rows; return the next logits, (rows, vocabulary) in the graph's dtype.

        The step covers the other rows too: it writes keys and values past their end, and their next step overwrites
        them.
        """
        step = dict(zip((row.index for row in wanted), token_ids, strict=True))
        ends = [min(row.length + 1, self._capacity) for row in self._rows]
        ids = np.array([[step.get(index, 0)] for index in range(len(self._rows))], dtype=np.int64)
        mask = (np.arange(max(ends)) < np.array(ends)[:, None]).astype(np.int64)
        logits = self._run(0, len(self._rows), ids, mask)
        for row in wanted:
            row.length += 1
        return logits[[row.index for row in wanted], -1]

    def read(self, row: Row, token_ids: Sequence[int]) -> np.ndarray:
        """Append tokens to one row; return the logits after each, (tokens, vocabulary) in the graph's dtype."""
        ids = np.array([token_ids], dtype=np.int64)
        mask = np.ones((1, row.length + len(token_ids)), dtype=np.int64)
        logits = self._run(row.index, 1, ids, mask)
        row.length += len(token_ids)
        return logits[0]

    def give_back(self, row: Row) -> None:
        """Free a row. The last row moves into its place, so that steps cover no free rows."""
        last = self._rows.pop()
        if last is not row:
            for buffer in self._buffers.values():
                buffer[row.index, :, : last.length] = buffer[last.index, :, : last.length]
            last.index = row.index
            self._rows[last.index] = last
        if self._rows:
            self._release(len(self._rows))
        else:
            self._buffers, self._memory = {}, {}  # an idle server holds no cache

    def kept(self, row: Row, start: int, stop: int) -> KeysValues:
        """See `Steps.kept`."""
        return [buffer[row.index, :, start:stop] for buffer in self._buffers.values()]

    def fill(self, row: Row, parts: Sequence[KeysValues]) -> None:
        """See `Steps.fill`."""
        for buffer, tensors in zip(self._buffers.values(), zip(*parts, strict=True), strict=True):
            write_into(buffer[row.index], tensors)
        row.length = tokens_of(parts)

    def _release(self, index: int) -> None:
        """Return the memory of a free row to the operating system, where single pages can be returned."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name, memory in self._memory.items():
            size = self._buffers[name][index].nbytes
            start = -(-index * size // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (index + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0:
                memory.madvise(mmap.MADV_DONTNEED, start, length)

    def _run(self, first: int, count: int, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        session = self._session
        binding: ort.IOBinding = session.binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        for name, buffer in self._buffers.items():
            rows = buffer[first : first + count]
            binding.bind_input(name, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
            binding.bind_output(session.present_of(name), "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        session.run(binding)
        return binding.get_outputs()[0].numpy()


class Row:
    """The KV cache of one text in a pool; implements `Steps`."""

    def __init__(self, pool: RowPool, index: int) -> None:
        self._pool = pool
        self.index = index
        self.length = 0

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._pool.read(self, token_ids)

    def kept(self, start: int, stop: int) -> KeysValues:
        return self._pool.kept(self, start, stop)

    def fill(self, parts: Sequence[KeysValues]) -> None:
        self._pool.fill(self, parts)

    def close(self) -> None:
        self._pool.give_back(self)


def _reserve(size: int) -> mmap.mmap:
    """Return `size` zero bytes, which take memory only once they are written."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
