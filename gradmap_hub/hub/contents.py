"""Compares local files with a repository by their content ids, without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gradmap_hub.layout import CARD, sha256_of

# Files that the Hub itself creates and edits.
HUB_OWN_FILES = frozenset({".gitattributes"})
# Files of a repository that is otherwise empty: the Hub also gives a new Space a README.md.
PLACEHOLDERS = {"model": HUB_OWN_FILES, "space": HUB_OWN_FILES | {CARD}}


def same_content(local: Mapping[str, Path], remote: Mapping[str, str]) -> bool:
    """Whether a repository holds exactly these files. `remote`: {path: content id}, see `RepoState.files`."""
    return set(local) == set(remote) - (HUB_OWN_FILES - set(local)) and holds(local, remote)


def holds(local: Mapping[str, Path], remote: Mapping[str, str]) -> bool:
    """Whether a repository holds these files, possibly among others."""
    return set(local) <= set(remote) and all(
        remote[name] == (sha256_of(path) if len(remote[name]) == 64 else _git_blob_id(path))
        for name, path in local.items()
    )


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
