"""Git object ids of blobs, LFS pointers, trees and commits. Pure functions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One file of a tree. ``sha256`` is set for files stored as LFS; ``oid`` is then the id of the pointer."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def object_id(kind: str, content: bytes) -> str:
    # Git object ids are SHA-1; security does not depend on them.
    return hashlib.sha1(b"%s %d\x00" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()


def blob_id(content: bytes) -> str:
    return object_id("blob", content)


def pointer(sha256: str, size: int) -> bytes:
    """The pointer file that git-lfs stores in the tree."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(blob_id(pointer(sha256, size)), size, sha256)


def tree_ids(files: Mapping[str, Entry]) -> dict[str, str]:
    """The tree id of every folder, by path; the root is ``""``."""
    children: dict[str, dict[str, str | None]] = {"": {}}
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, {})[name] = entry.oid
        while folder:
            parent, _, name = folder.rpartition("/")
            children.setdefault(parent, {})[name] = None
            folder = parent
    ids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: path.count("/") if path else -1, reverse=True):
        rows: list[tuple[bytes, bytes]] = []
        for name, oid in children[folder].items():
            if oid is None:
                subfolder = f"{folder}/{name}" if folder else name
                row = b"40000 %s\x00" % name.encode() + bytes.fromhex(ids[subfolder])
                # git sorts folders as if their names ended with a slash.
                rows.append((name.encode() + b"/", row))
            else:
                rows.append((name.encode(), b"100644 %s\x00" % name.encode() + bytes.fromhex(oid)))
        ids[folder] = object_id("tree", b"".join(row for _, row in sorted(rows)))
    return ids


def commit_id(tree: str, parents: Sequence[str], author: str, timestamp: int, message: str) -> str:
    who = f"{author} <{author}@users.noreply.localhost> {timestamp} +0000"
    lines = [f"tree {tree}", *(f"parent {parent}" for parent in parents), f"author {who}", f"committer {who}"]
    return object_id("commit", ("\n".join(lines) + f"\n\n{message}\n").encode())
