"""Name validation. Every name that reaches the disk or a ref passes through here."""

import re
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidName, RepoNotFound

RepoType = Literal["model", "dataset", "space"]

#: Repository type -> its plural in API paths.
PLURALS: dict[RepoType, str] = {"model": "models", "dataset": "datasets", "space": "spaces"}
#: Repository type -> the prefix of the id in file and page URLs. Models come last: routes are matched in this order,
#: and "datasets/..." would also match a model of an owner with that (reserved) name.
PREFIXES: dict[RepoType, str] = {"space": "spaces/", "dataset": "datasets/", "model": ""}

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_RESERVED_NAMESPACES = frozenset({"api", "datasets", "spaces", "models", "lfs", "xet", "collections", "docs"})
_REF_COMPONENT = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHA = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RepoKey:
    """A repository: its type, owner and name, all validated."""

    type: RepoType
    namespace: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        """The path of the repository's page, without a leading slash."""
        return PREFIXES[self.type] + self.id


def parse_repo_id(repo_id: str, repo_type: str = "model") -> RepoKey:
    """Validate ``owner/name``.

    Raises:
        InvalidName: the id is not ``owner/name``, a part is invalid, or the repository type is unknown.
    """
    namespace, slash, name = repo_id.partition("/")
    if not slash:
        raise InvalidName(f"A repository id must be owner/name, got {repo_id!r}")
    return repo_key(namespace, name, repo_type)


def repo_key(namespace: str, name: str, repo_type: str = "model") -> RepoKey:
    """Validate the parts of a repository id.

    Raises:
        InvalidName: a part is invalid, or the repository type is unknown.
    """
    checked: RepoType
    if repo_type == "model":
        checked = "model"
    elif repo_type == "dataset":
        checked = "dataset"
    elif repo_type == "space":
        checked = "space"
    else:
        raise InvalidName(f"Unknown repository type {repo_type!r}")
    return RepoKey(checked, check_owner(namespace), check_repo_name(name))


def requested_key(namespace: str, name: str, repo_type: RepoType) -> RepoKey:
    """Like :func:`repo_key` for names in request paths: an invalid name raises RepoNotFound."""
    try:
        return repo_key(namespace, name, repo_type)
    except InvalidName:
        raise RepoNotFound from None


def check_repo_name(name: str) -> str:
    if len(name) > 96 or not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise InvalidName(f"Invalid repository name {name!r}")
    return name


def check_owner(name: str) -> str:
    """Validate a user or organisation name."""
    if name in _RESERVED_NAMESPACES:
        raise InvalidName(f"The name {name!r} is reserved")
    return check_repo_name(name)


def check_path(path: str) -> str:
    """Validate the path of a file or folder in a repository and return it unchanged.

    Raises:
        InvalidName: the path is empty, too long or absolute, leaves the repository, lies in ``.git``, contains control
            characters or backslashes, or is not Unicode (the name of a local file may have other bytes).
    """
    # Backslashes and drive letters are dangerous on Windows machines that download the file.
    if not path or len(path) > 4096 or "\\" in path or any(ord(char) < 32 or ord(char) == 127 for char in path):
        raise InvalidName(f"Invalid path {path!r}: 1 to 4096 characters, no backslashes and no control characters")
    for part in path.split("/"):
        # Half of a surrogate pair has no bytes; replaced, it is as long as any other character.
        size = len(part.encode("utf-8", "replace"))
        if part in ("", ".", "..") or part.casefold() == ".git" or size > 255 or _SURROGATE.search(part):
            raise InvalidName(
                f"Invalid path {path!r}: each part must be 1 to 255 bytes of valid Unicode and not '.', '..' or '.git'"
            )
    if re.match(r"[A-Za-z]:", path):
        raise InvalidName(f"Invalid path {path!r}: it begins with a drive letter")
    return path


def check_ref_name(name: str) -> str:
    """Validate the name of a new branch or tag, following ``git check-ref-format``."""
    parts = name.split("/")
    if (
        len(name) > 200
        or not all(_REF_COMPONENT.fullmatch(part) for part in parts)
        or any(part.startswith((".", "-")) or part.endswith((".lock", ".")) for part in parts)
        or ".." in name
        or "@{" in name
        or name == "@"
        or parts[0] == "refs"
        or is_sha(name)
    ):
        raise InvalidName(f"Invalid reference name {name!r}")
    return name


def is_sha(text: str) -> bool:
    return _SHA.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None
