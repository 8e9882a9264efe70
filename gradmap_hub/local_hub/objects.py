"""Content-addressed objects of one repository: blobs, LFS objects, trees and commits.

An object is written to a temporary file and renamed into place, so it is either complete or absent, and it is
immutable. Objects are stored per repository: if they were shared, anybody who knows a hash could commit it and read
another owner's private file.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from .errors import HubError
from .gitids import Entry, blob_id

CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Commit:
    """A commit. ``date`` is ISO 8601 in UTC; the first commit has no ``parents``."""

    id: str
    tree: str
    parents: tuple[str, ...]
    title: str
    description: str
    author: str
    date: str


class CorruptUpload(HubError):
    """The received bytes are not the announced object."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class LfsWriter:
    """Receives one LFS object in chunks; :meth:`commit` stores it only if size and SHA-256 match."""

    def __init__(self, temporary: Path, target: Path, sha256: str, size: int) -> None:
        self._temporary = temporary
        self._target = target
        self._sha256 = sha256
        self._size = size
        self._hash = hashlib.sha256()
        self._received = 0

    def __enter__(self) -> Self:
        self._file = open_private(self._temporary)
        return self

    def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        # Excess bytes are read but not stored: closing the connection early would make the client retry instead of
        # reading the error.
        if self._received <= self._size:
            self._hash.update(chunk)
            self._file.write(chunk)

    def commit(self) -> None:
        """Move the object into place.

        Raises:
            CorruptUpload: the size or SHA-256 is wrong; nothing is stored.
        """
        if self._received != self._size:
            raise CorruptUpload(f"Expected {self._size} bytes, received {self._received}")
        if self._hash.hexdigest() != self._sha256:
            raise CorruptUpload(f"The content does not have the announced SHA-256 {self._sha256}")
        self._file.close()
        make_folder(self._target.parent)
        os.replace(self._temporary, self._target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class Objects:
    """The objects of the repository in ``folder``; ``temporary`` must be on the same file system."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self._folder = folder
        self._temporary = temporary

    def _path(self, kind: str, oid: str) -> Path:
        return self._folder / kind / oid[:2] / oid[2:]

    def _write(self, path: Path, content: bytes) -> None:
        if path.exists():
            return
        make_folder(path.parent)
        write_atomically(path, content, self._temporary)

    def put_blob(self, content: bytes) -> Entry:
        oid = blob_id(content)
        self._write(self._path("blobs", oid), content)
        return Entry(oid, len(content))

    def has_lfs(self, sha256: str) -> bool:
        return self._path("lfs", sha256).is_file()

    def lfs_size(self, sha256: str) -> int | None:
        """The size of an LFS object in bytes; None if it is not stored."""
        try:
            return self._path("lfs", sha256).stat().st_size
        except FileNotFoundError:
            return None

    def lfs_writer(self, sha256: str, size: int) -> LfsWriter:
        return LfsWriter(self._temporary / secrets.token_hex(16), self._path("lfs", sha256), sha256, size)

    def lfs_file(self, sha256: str) -> Path:
        """The path of an LFS object, stored or not."""
        return self._path("lfs", sha256)

    def put_lfs(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        with self.lfs_writer(sha256, size) as writer:
            for chunk in chunks:
                writer.write(chunk)
            writer.commit()

    def file(self, entry: Entry) -> Path:
        """The path on disk of a file's content."""
        return self._path("lfs", entry.sha256) if entry.sha256 else self._path("blobs", entry.oid)

    def read(self, entry: Entry, limit: int = 16 * CHUNK) -> bytes:
        """The first ``limit`` bytes of a file."""
        with self.file(entry).open("rb") as file:
            return file.read(limit)

    def put_tree(self, tree: str, files: Mapping[str, Entry]) -> None:
        rows = {path: [entry.oid, entry.size, entry.sha256] for path, entry in sorted(files.items())}
        self._write(self._path("trees", tree), json.dumps(rows).encode())

    def tree(self, tree: str) -> dict[str, Entry]:
        rows: dict[str, tuple[str, int, str | None]] = json.loads(self._path("trees", tree).read_bytes())
        return {path: Entry(*row) for path, row in rows.items()}

    def put_commit(self, commit: Commit) -> None:
        self._write(self._path("commits", commit.id), json.dumps(asdict(commit)).encode())

    def commit(self, oid: str) -> Commit:
        """The commit with this id.

        Raises:
            FileNotFoundError: the commit does not exist.
        """
        row: dict[str, Any] = json.loads(self._path("commits", oid).read_bytes())
        return Commit(**{**row, "parents": tuple(row["parents"])})

    def commits_starting(self, prefix: str) -> list[str]:
        """The ids of the commits that start with ``prefix`` (at least two hex digits)."""
        folder = self._folder / "commits" / prefix[:2]
        if not folder.is_dir():
            return []
        return [prefix[:2] + rest.name for rest in folder.iterdir() if rest.name.startswith(prefix[2:])]


def make_folder(path: Path) -> None:
    """Create a folder and its parents as needed. Only their owner can enter, regardless of the umask."""
    for folder in (*reversed(path.parents), path):
        # `parents=True` would give the parents the mode of the umask.
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: Path) -> IO[bytes]:
    """Create a file and its folder, and open the file for writing. Only its owner can read it.

    Raises:
        FileExistsError: the file exists.
    """
    make_folder(path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def write_atomically(path: Path, content: bytes, temporary: Path) -> None:
    """Replace ``path`` atomically. Only the owner can read the file, regardless of the umask."""
    draft = temporary / secrets.token_hex(16)
    try:
        with open_private(draft) as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_chunks(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """Read ``length`` bytes from ``start`` (default: the rest of the file) in chunks."""
    left = path.stat().st_size - start if length is None else length
    with path.open("rb") as file:
        file.seek(start)
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                return
            left -= len(chunk)
            yield chunk


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
