"""LFS objects that arrive in parts.

An upload is a folder among the temporary files: the bytes, each part written at its place, and for each part
that arrived a file with its SHA-256. What is never completed is removed when the hub starts, or when it is old.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import HubError
from .objects import CorruptUpload, hash_file

_PREFIX = "multipart-"
_MOST_PARTS = 1000


@dataclass(frozen=True)
class Plan:
    """How an object of ``size`` bytes is cut into parts of ``chunk`` bytes; the last one may be shorter."""

    size: int
    chunk: int

    @staticmethod
    def for_size(size: int, chunk: int) -> "Plan":
        """Parts of ``chunk`` bytes, or longer where there would be too many."""
        return Plan(size, max(chunk, -(-size // _MOST_PARTS)))

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk)

    def part_size(self, number: int) -> int:
        """The length of a part; the first one has number 1."""
        return min(self.chunk, self.size - (number - 1) * self.chunk)


def new_upload_id(temporary: Path, older_than: float) -> str:
    """A name for an upload. Uploads that nothing was added to for so many seconds are removed."""
    for folder in temporary.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime > older_than:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # completed meanwhile
            continue
    return secrets.token_hex(16)


class MultipartUpload:
    """One upload, under way in ``temporary``; several requests may work on different parts of it."""

    def __init__(self, temporary: Path, upload_id: str, plan: Plan) -> None:
        self.plan = plan
        self._folder = temporary / f"{_PREFIX}{upload_id}"

    def part_writer(self, number: int) -> "PartWriter":
        """Receives one part. A part that was there is replaced."""
        return PartWriter(self._folder, number, self.plan)

    def complete(self, etags: Sequence[str], sha256: str, target: Path) -> None:
        """Move the object into place.

        Args:
            etags: what :meth:`PartWriter.commit` returned for each part, in the order of the parts.
            sha256: what the whole object must have.
            target: where it goes.

        Raises:
            CorruptUpload: a part is missing or another one than was acknowledged (it can be sent again), or the
                whole does not have this SHA-256 (then nothing is kept).
        """
        if len(etags) != self.plan.count:
            raise CorruptUpload(f"The upload has {self.plan.count} parts, {len(etags)} were named")
        for number, etag in enumerate(etags, 1):
            if _stored_etag(self._folder, number) != etag:
                raise CorruptUpload(f"Part {number} is missing, or it is another one than was acknowledged")
        content = self._folder / "content"
        try:
            if hash_file(content) != sha256:
                raise CorruptUpload(f"The content does not have the announced SHA-256 {sha256}")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(content, target)
        except FileNotFoundError:
            raise HubError(409, "The upload was completed or given up meanwhile") from None
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


class PartWriter:
    """Receives one part in pieces; it counts only once :meth:`commit` was called."""

    def __init__(self, folder: Path, number: int, plan: Plan) -> None:
        self._folder = folder
        self._number = number
        self._size = plan.part_size(number)
        self._start = (number - 1) * plan.chunk
        self._hash = hashlib.sha256()
        self._received = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / str(self._number)).unlink(missing_ok=True)
        # Parts may arrive in any order, several at a time: none may truncate what the others wrote.
        descriptor = os.open(self._folder / "content", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        self._file.seek(self._start)
        return self

    def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        # What is too long is read to its end, as for whole objects, but not written over the next part.
        if self._received <= self._size:
            self._hash.update(chunk)
            self._file.write(chunk)

    def commit(self) -> str:
        """Acknowledge the part; returns its ETag.

        Raises:
            CorruptUpload: the part does not have the planned size.
        """
        if self._received != self._size:
            raise CorruptUpload(f"Part {self._number} has {self._size} bytes, received {self._received}")
        self._file.flush()
        etag = self._hash.hexdigest()
        (self._folder / str(self._number)).write_text(etag)
        return etag

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _stored_etag(folder: Path, number: int) -> str | None:
    try:
        return (folder / str(number)).read_text()
    except FileNotFoundError:
        return None
