"""Whether a folder here and a repository there hold the same, judged by content ids: nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gradmap_hub.layout import CARD, sha256_of

# Files the Hub itself puts into a new repository, and edits on its own.
HUB_OWN_FILES = frozenset({".gitattributes"})
# A new Space also starts with a README that says so; one that holds nothing else has never had an app.
PLACEHOLDERS = {"model": HUB_OWN_FILES, "space": HUB_OWN_FILES | {CARD}}


def same_content(local: Mapping[str, Path], remote: Mapping[str, str]) -> bool:
    """Whether a repository holds these files and no others."""
    return set(local) == set(remote) - (HUB_OWN_FILES - set(local)) and holds(local, remote)


def holds(local: Mapping[str, Path], remote: Mapping[str, str]) -> bool:
    """Whether a repository holds these files, whatever else."""
    return set(local) <= set(remote) and all(
        remote[name] == (sha256_of(path) if len(remote[name]) == 64 else _git_blob_id(path))
        for name, path in local.items()
    )


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
