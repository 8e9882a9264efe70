"""Multipart uploads of LFS objects.

An upload is a folder in the temporary directory: one file with the bytes, each part written at its offset, and per
received part a file with its SHA-256. Incomplete uploads are removed when they expire or the hub starts.
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
from .objects import CorruptUpload, hash_file, make_folder, write_atomically

_PREFIX = "multipart-"
_MOST_PARTS = 1000


@dataclass(frozen=True)
class Plan:
    """How an object of ``size`` bytes is split into parts of ``chunk`` bytes; the last one may be shorter."""

    size: int
    chunk: int

    @staticmethod
    def for_size(size: int, chunk: int) -> "Plan":
        """A plan with parts of ``chunk`` bytes, or larger ones to stay below the maximum number of parts."""
        return Plan(size, max(chunk, -(-size // _MOST_PARTS)))

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk)

    def part_size(self, number: int) -> int:
        """The size of a part in bytes; numbers start at 1."""
        return min(self.chunk, self.size - (number - 1) * self.chunk)


def new_upload_id(temporary: Path, older_than: float) -> str:
    """A new upload id. Removes uploads that have been idle for more than ``older_than`` seconds."""
    for folder in temporary.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime > older_than:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # completed in the meantime
            continue
    return secrets.token_hex(16)


class MultipartUpload:
    """One upload in progress. Concurrent requests may write different parts."""

    def __init__(self, temporary: Path, upload_id: str, plan: Plan) -> None:
        self.plan = plan
        self._folder = temporary / f"{_PREFIX}{upload_id}"

    def part_writer(self, number: int) -> "PartWriter":
        """A writer for one part. It replaces an earlier version of the part."""
        return PartWriter(self._folder, number, self.plan)

    def complete(self, etags: Sequence[str], sha256: str, target: Path) -> None:
        """Verify the object and move it into place.

        Args:
            etags: the ETag that :meth:`PartWriter.commit` returned for each part, in order.
            sha256: the expected SHA-256 of the whole object.
            target: the final path.

        Raises:
            CorruptUpload: a part is missing or its ETag differs (the part can be sent again), or the SHA-256 of the
                object differs (the upload is discarded).
            HubError: 409, another request completed or discarded the upload.
        """
        if len(etags) != self.plan.count:
            raise CorruptUpload(f"The upload has {self.plan.count} parts, the request lists {len(etags)}")
        for number, etag in enumerate(etags, 1):
            if _stored_etag(self._folder, number) != etag:
                raise CorruptUpload(f"Part {number} is missing or its ETag does not match")
        content = self._folder / "content"
        try:
            if hash_file(content) != sha256:
                raise CorruptUpload(f"The content does not have the announced SHA-256 {sha256}")
            make_folder(target.parent)
            os.replace(content, target)
        except FileNotFoundError:
            raise HubError(409, "Another request completed or discarded this upload") from None
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


class PartWriter:
    """Receives one part in chunks; the part is valid once :meth:`commit` returns."""

    def __init__(self, folder: Path, number: int, plan: Plan) -> None:
        self._folder = folder
        self._number = number
        self._size = plan.part_size(number)
        self._start = (number - 1) * plan.chunk
        self._hash = hashlib.sha256()
        self._received = 0

    def __enter__(self) -> Self:
        make_folder(self._folder)
        (self._folder / str(self._number)).unlink(missing_ok=True)
        # Parts arrive concurrently and in any order, so opening must not truncate the file.
        descriptor = os.open(self._folder / "content", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        self._file.seek(self._start)
        return self

    def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        # Excess bytes are read, as for whole objects, but must not overwrite the next part.
        if self._received <= self._size:
            self._hash.update(chunk)
            self._file.write(chunk)

    def commit(self) -> str:
        """Accept the part and return its ETag.

        Raises:
            CorruptUpload: the size of the part is wrong.
        """
        if self._received != self._size:
            raise CorruptUpload(f"Expected {self._size} bytes for part {self._number}, received {self._received}")
        self._file.flush()
        etag = self._hash.hexdigest()
        write_atomically(self._folder / str(self._number), etag.encode(), self._folder)
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
