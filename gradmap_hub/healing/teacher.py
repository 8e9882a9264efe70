"""The original's next-token distributions, computed once and cached on disk: training needs no teacher in memory.

Stored per position: the K most likely tokens (index and float16 log-probability) and the total probability of all
others (float16). An interrupted computation resumes at the last recorded sequence.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradmap_hub.budget import TOP_K, index_bytes
from gradmap_hub.errors import DiskTooSmall, GradmapError
from gradmap_hub.files import write_text
from gradmap_hub.healing.objective import CHUNK, TopK, top_k

if TYPE_CHECKING:
    from gradmap_hub.models.decoder import Decoder

# Sequences after which the progress is recorded.
_FLUSH = 32


class TeacherCache:
    """The distributions for `ids` (sequences, tokens) int64, in the files of `folder`.

    Args:
        vocabulary: Number of logits of the original.
        teacher: Identifies the original and the dtype of its computation; a cache of another teacher is replaced.
        k: Most likely tokens stored per position, at most `vocabulary`.
    """

    def __init__(self, folder: Path, ids: Tensor, vocabulary: int, teacher: str, *, k: int = TOP_K) -> None:
        self.folder = folder
        self.ids = ids
        self.k = min(k, vocabulary)
        self._key = hashlib.sha256(f"{teacher}:{self.k}:".encode() + ids.numpy().tobytes()).hexdigest()
        self._state = folder / "teacher.json"
        self._shapes = {
            "indices": (np.uint16 if index_bytes(vocabulary) == 2 else np.uint32, (*ids.shape, self.k)),
            "logprobs": (np.float16, (*ids.shape, self.k)),
            "rest": (np.float16, tuple(ids.shape)),
        }
        self._arrays: dict[str, Any] = {}

    @property
    def done(self) -> int:
        """Number of sequences, from the first, that are on disk."""
        try:
            stored = json.loads(self._state.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0
        return int(stored["done"]) if stored.get("key") == self._key else 0

    @property
    def bytes(self) -> int:
        return sum(int(np.prod(shape)) * kind().itemsize for kind, shape in self._shapes.values())

    def fill(self, decoder: Decoder, advance: Callable[[int], None] = lambda _sequences: None) -> None:
        """Compute the missing distributions.

        Args:
            decoder: Of the original.
            advance: Called with the number of sequences that are done: first those on disk, then each new one.

        Raises:
            DiskTooSmall: the disk is full; the sequences recorded so far are kept.
            GradmapError: the files cannot be written for another reason.
        """
        done = self.done
        advance(done)
        if done == len(self.ids):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._open("r+" if done else "w+")
            for start in range(done, len(self.ids), _FLUSH):
                group = self.ids[start : start + _FLUSH]
                for place, found in enumerate(self._distributions(decoder, group), start=start):
                    self._arrays["indices"][place] = found.indices.cpu().numpy()
                    self._arrays["logprobs"][place] = found.logprobs.cpu().numpy()
                    self._arrays["rest"][place] = found.rest.cpu().numpy()
                    advance(1)
                for array in self._arrays.values():
                    array.flush()
                write_text(self._state, json.dumps({"key": self._key, "done": start + len(group)}))
        except OSError as error:
            if self.done == 0:
                self.remove()
            raise _full(self.folder, self.bytes, error) from error
        finally:
            self._arrays = {}

    def _distributions(self, decoder: Decoder, ids: Tensor) -> list[TopK]:
        """For each sequence of `ids` (n, tokens), the original's distributions at all positions."""
        found: list[TopK] = []
        with torch.no_grad():
            states = [decoder.embed(row) for row in ids.split(1)]
            decoder.carry(states, range(decoder.count))
            for state in states:
                parts = [top_k(decoder.head(part), self.k) for part in decoder.norm(state)[0].split(CHUNK)]
                found.append(
                    TopK(
                        torch.cat([part.indices for part in parts]),
                        torch.cat([part.logprobs for part in parts]),
                        torch.cat([part.rest for part in parts]),
                    )
                )
        return found

    def of(self, places: Sequence[int]) -> TopK:
        """The distributions of the sequences `places` (indices into `ids`), concatenated: (sequences * tokens, K)."""
        if not self._arrays:
            self._open("r")
        kinds = {"indices": np.int64, "logprobs": np.float32, "rest": np.float32}
        found = {
            name: torch.from_numpy(array[list(places)].astype(kinds[name])).flatten(0, 1)
            for name, array in self._arrays.items()
        }
        return TopK(found["indices"], found["logprobs"], found["rest"])

    def _open(self, mode: Any) -> None:
        """Map the arrays into memory. Sequences from number `done` on are not computed yet and contain zeros."""
        if mode == "w+":
            self._state.unlink(missing_ok=True)
            self._reserve()
            mode = "r+"
        self._arrays = {
            name: np.memmap(self.folder / f"teacher-{name}.bin", dtype=kind, mode=mode, shape=shape)
            for name, (kind, shape) in self._shapes.items()
        }

    def _reserve(self) -> None:
        """Allocate the files in full: writing to an unallocated page of a mapping on a full disk kills the process."""
        for name, (kind, shape) in self._shapes.items():
            size = int(np.prod(shape)) * kind().itemsize
            with (self.folder / f"teacher-{name}.bin").open("wb") as stream:
                _allocate(stream, size)

    def remove(self) -> None:
        """Delete the files."""
        self._arrays = {}
        for path in (self._state, *(self.folder / f"teacher-{name}.bin" for name in self._shapes)):
            path.unlink(missing_ok=True)


def _allocate(stream: Any, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
        return
    block = bytes(1 << 20)  # macOS
    for start in range(0, size, len(block)):
        stream.write(block[: size - start])


def _full(folder: Path, needed: int, error: OSError) -> GradmapError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskTooSmall(str(folder), needed, shutil.disk_usage(folder).free)
    return GradmapError(f"The original's predictions cannot be stored in {folder}: {error}")
