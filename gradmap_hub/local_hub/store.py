"""Repositories in a directory: their state, their history and all writes to them.

The mutable state of a repository (settings, branches, tags, pull requests, variables) is one small JSON file. It is
replaced atomically after the objects it refers to are written, so a crash leaves either the old or the new state.
Nothing is cached between calls, so writes of another process are visible. Writes survive a crash of the hub, but not a
power failure (no fsync).
"""

import json
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import EntryNotFound, HubError, RepoExists, RepoNotFound, RevisionNotFound, StaleParent
from .gitids import Entry, commit_id, tree_ids
from .names import PLURALS, RepoKey, RepoType, check_path, check_ref_name
from .objects import Commit, Objects, make_folder, write_atomically
from .patterns import default_attributes, track
from .spacebuild import SpaceBuild

Gated = Literal["auto", "manual", False]

_SPACE_README = """---
title: {title}
colorFrom: gray
colorTo: blue
sdk: {sdk}
pinned: false
---

Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference
"""


@dataclass(frozen=True)
class Variable:
    """A Space variable or secret. The value of a secret is never stored."""

    value: str
    description: str | None
    updated_at: str


@dataclass(frozen=True)
class PullRequest:
    """A pull request. ``created_at`` is empty in files written by older versions."""

    number: int
    title: str
    author: str
    head: str
    description: str = ""
    created_at: str = ""
    status: Literal["open", "draft", "closed"] = "open"


@dataclass(frozen=True)
class SpaceSettings:
    sdk: str
    hardware: str | None = None
    storage: str | None = None
    sleep_time: int | None = None


@dataclass(frozen=True)
class RepoState:
    """The mutable state of a repository. Updated only through :meth:`Store.update`."""

    internal_id: str
    created_at: str
    private: bool
    branches: Mapping[str, str]
    gated: Gated = False
    granted: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    pulls: tuple[PullRequest, ...] = ()
    space: SpaceSettings | None = None
    build: SpaceBuild = field(default_factory=SpaceBuild)
    variables: Mapping[str, Variable] = field(default_factory=dict)
    secrets: Mapping[str, Variable] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(text: bytes) -> "RepoState":
        row: dict[str, Any] = json.loads(text)
        return RepoState(
            **{
                **row,
                "granted": tuple(row["granted"]),
                "pulls": tuple(PullRequest(**pull) for pull in row["pulls"]),
                "space": SpaceSettings(**row["space"]) if row["space"] else None,
                # Files written by older versions lack this key.
                "build": SpaceBuild(**row.get("build", {})),
                "variables": {key: Variable(**value) for key, value in row["variables"].items()},
                "secrets": {key: Variable(**value) for key, value in row["secrets"].items()},
            }
        )


@dataclass(frozen=True)
class AddFile:
    path: str
    entry: Entry


@dataclass(frozen=True)
class DeleteFile:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Change = AddFile | DeleteFile | DeleteFolder


@dataclass(frozen=True)
class NewCommit:
    """A commit to create.

    Args:
        parent: the expected head, at least its first five digits.
        into: the internal id of the repository, if it was looked up before: another one may have its name by now.
    """

    title: str
    author: str
    changes: tuple[Change, ...]
    description: str = ""
    parent: str | None = None
    create_pr: bool = False
    into: str | None = None


@dataclass(frozen=True)
class Committed:
    oid: str
    pull_request: int | None = None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Store:
    """The repositories under ``root``. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temporary = root / "tmp"
        self._locks: dict[RepoKey, threading.RLock] = {}
        self._locks_guard = threading.Lock()
        # Older versions wrote files that all users can read; the mode of these folders keeps others out.
        for folder in (self.temporary, root / "repos", root / "xorbs"):
            make_folder(folder)
            folder.chmod(0o700)

    def lock(self, key: RepoKey) -> threading.RLock:
        with self._locks_guard:
            return self._locks.setdefault(key, threading.RLock())

    def _folder(self, key: RepoKey) -> Path:
        return self.root / "repos" / PLURALS[key.type] / key.namespace / key.name

    def _state_file(self, key: RepoKey) -> Path:
        return self._folder(key) / "repo.json"

    def objects(self, key: RepoKey) -> Objects:
        return Objects(self._folder(key), self.temporary)

    def xorb(self, name: str) -> Path:
        """The path of a xorb, stored or not. Repositories share xorbs, because a client never sends one twice."""
        return self.root / "xorbs" / name[:2] / name[2:]

    def clear_temporary(self) -> None:
        """Remove files that an interrupted hub left. No other hub may use the directory."""
        for leftover in self.temporary.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    # Repositories

    def keys(self, repo_type: RepoType) -> list[RepoKey]:
        folder = self.root / "repos" / PLURALS[repo_type]
        found = folder.glob("*/*/repo.json")
        return sorted(
            (RepoKey(repo_type, file.parent.parent.name, file.parent.name) for file in found),
            key=lambda key: key.id.casefold(),
        )

    def exists(self, key: RepoKey) -> bool:
        return self._state_file(key).is_file()

    def state(self, key: RepoKey) -> RepoState:
        """The state of a repository.

        Raises:
            RepoNotFound: the repository does not exist.
        """
        try:
            return RepoState.from_json(self._state_file(key).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise RepoNotFound from None

    def update(self, key: RepoKey, change: Callable[[RepoState], RepoState]) -> RepoState:
        """Replace the state of a repository with ``change(state)`` under its lock; return the new state."""
        with self.lock(key):
            state = change(self.state(key))
            write_atomically(self._state_file(key), state.to_json(), self.temporary)
            return state

    def create(self, key: RepoKey, author: str, private: bool = False, space: SpaceSettings | None = None) -> RepoState:
        """Create a repository with the initial commit that the Hub makes.

        Raises:
            RepoExists: the repository already exists.
        """
        with self.lock(key):
            if self.exists(key):
                raise RepoExists(key.type, key.id)
            make_folder(self._folder(key))
            objects = self.objects(key)
            files = {".gitattributes": objects.put_blob(default_attributes(key.type).encode())}
            if space is not None:
                title = json.dumps(key.name.replace("-", " ").replace("_", " "))
                files["README.md"] = objects.put_blob(_SPACE_README.format(title=title, sdk=space.sdk).encode())
            commit = _write_commit(objects, files, NewCommit("initial commit", author, ()), ())
            state = RepoState(
                internal_id=secrets.token_hex(12),
                created_at=commit.date,
                private=private,
                branches={"main": commit.id},
                space=space,
            )
            write_atomically(self._state_file(key), state.to_json(), self.temporary)
            return state

    def delete(self, key: RepoKey) -> None:
        with self.lock(key):
            self.state(key)
            # Renamed first, so that no request finds a half-deleted repository.
            trash = self.temporary / secrets.token_hex(16)
            self._folder(key).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def move(self, key: RepoKey, new: RepoKey) -> None:
        """Rename a repository or transfer it to another owner.

        Raises:
            RepoNotFound: the repository does not exist.
            RepoExists: the new name is taken.
        """
        first, second = sorted((key, new), key=lambda each: each.id)
        with self.lock(first), self.lock(second):
            self.state(key)
            if self.exists(new):
                raise RepoExists(new.type, new.id)
            target = self._folder(new)
            make_folder(target.parent)
            # Remnants of an upload to a repository that was deleted during the upload.
            shutil.rmtree(target, ignore_errors=True)
            self._folder(key).rename(target)

    # History

    def resolve(self, key: RepoKey, revision: str) -> str:
        """Resolve a branch, tag, ref or commit id (at least seven digits) to a full commit id.

        Raises:
            RepoNotFound, RevisionNotFound
        """
        state = self.state(key)
        refs = _refs(state)
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if 7 <= len(revision) <= 40 and all(char in "0123456789abcdef" for char in revision):
            found = self.objects(key).commits_starting(revision)
            if len(found) == 1:
                return found[0]
        raise RevisionNotFound(revision)

    def commit_info(self, key: RepoKey, oid: str) -> Commit:
        try:
            return self.objects(key).commit(oid)
        except FileNotFoundError:
            raise RevisionNotFound(oid) from None

    def files(self, key: RepoKey, oid: str) -> dict[str, Entry]:
        """All files of a commit, by path, sorted."""
        return self.objects(key).tree(self.commit_info(key, oid).tree)

    def history(self, key: RepoKey, oid: str) -> Iterator[Commit]:
        """The commits from ``oid`` back to the first one."""
        while True:
            commit = self.commit_info(key, oid)
            yield commit
            if not commit.parents:
                return
            oid = commit.parents[0]

    def commit(self, key: RepoKey, revision: str, new: NewCommit) -> Committed:
        """Add a commit to a branch or pull request, or open a pull request with it.

        If the commit changes nothing, no commit is made and the current head is returned.

        Raises:
            RevisionNotFound: the branch does not exist.
            StaleParent: ``new.parent`` is not the head of the branch.
            EntryNotFound: a file or folder to delete does not exist.
            HubError: 400, a path would be both a file and a folder; 409, the repository is not the one of
                ``new.into``, or does not have the content of a file any more.
        """
        objects = self.objects(key)
        with self.lock(key):
            state = self.state(key)
            if new.into not in (None, state.internal_id) or not all(
                objects.file(change.entry).is_file() for change in new.changes if isinstance(change, AddFile)
            ):
                raise HubError(409, f"{key.id} was deleted or moved during this commit. Nothing was committed.")
            # A pull request may start from an older commit; a branch may not.
            if new.create_pr and new.parent is not None:
                head = self.resolve(key, new.parent.lower())
            else:
                head = _writable_head(state, revision)
            if new.parent is not None and not head.startswith(new.parent.lower()):
                raise StaleParent
            before = self.files(key, head)
            files = _apply(before, new.changes)
            files = _tracked(objects, before, files)
            if files == before and not new.create_pr:
                return Committed(head)
            commit = _write_commit(objects, files, new, (head,))
            if new.create_pr:
                pull = self._add_pull(key, new.title, new.author, commit.id, new.description, "open")
                return Committed(commit.id, pull.number)
            self.update(key, lambda old: _move(old, revision, commit.id))
            return Committed(commit.id)

    def open_pull_request(self, key: RepoKey, title: str, author: str, description: str) -> PullRequest:
        """Open a draft pull request without changes."""
        with self.lock(key):
            return self._add_pull(key, title, author, self.state(key).branches["main"], description, "draft")

    def _add_pull(
        self, key: RepoKey, title: str, author: str, head: str, description: str, status: Literal["open", "draft"]
    ) -> PullRequest:
        number = len(self.state(key).pulls) + 1
        pull = PullRequest(number, title, author, head, description, now(), status)
        self.update(key, lambda old: replace(old, pulls=(*old.pulls, pull)))
        return pull

    # Branches and tags

    def create_branch(self, key: RepoKey, name: str, start: str | None) -> None:
        check_ref_name(name)
        with self.lock(key):
            oid = self.resolve(key, start or "main")
            _refuse_existing(self.state(key).branches, name)
            self.update(key, lambda old: replace(old, branches={**old.branches, name: oid}))

    def create_tag(self, key: RepoKey, name: str, revision: str) -> None:
        check_ref_name(name)
        with self.lock(key):
            oid = self.resolve(key, revision)
            _refuse_existing(self.state(key).tags, name)
            self.update(key, lambda old: replace(old, tags={**old.tags, name: oid}))

    def delete_branch(self, key: RepoKey, name: str) -> None:
        with self.lock(key):
            if name == "main":
                raise HubError(403, "The default branch cannot be deleted")
            if name not in self.state(key).branches:
                raise RevisionNotFound(name)
            self.update(key, lambda old: replace(old, branches=_without(old.branches, name)))

    def delete_tag(self, key: RepoKey, name: str) -> None:
        with self.lock(key):
            if name not in self.state(key).tags:
                raise RevisionNotFound(name)
            self.update(key, lambda old: replace(old, tags=_without(old.tags, name)))


def last_commits(store: Store, key: RepoKey, oid: str, paths: Iterable[str]) -> dict[str, Commit]:
    """The last commit that changed each of these files and folders, by path."""
    wanted = set(paths)
    found: dict[str, Commit] = {}
    newer: Commit | None = None
    newer_ids: dict[str, str] = {}
    for commit in store.history(key, oid):
        files = store.files(key, commit.id)
        ids = tree_ids(files) | {path: entry.oid for path, entry in files.items()}
        if newer is not None:
            for path in wanted - found.keys():
                if ids.get(path) != newer_ids.get(path):
                    found[path] = newer
        if wanted <= found.keys():
            return found
        newer, newer_ids = commit, ids
    if newer is not None:
        found.update(dict.fromkeys(wanted - found.keys(), newer))
    return found


def _refs(state: RepoState) -> dict[str, str]:
    return {
        **{f"refs/heads/{name}": oid for name, oid in state.branches.items()},
        **{f"refs/tags/{name}": oid for name, oid in state.tags.items()},
        **{f"refs/pr/{pull.number}": pull.head for pull in state.pulls},
    }


def _writable_head(state: RepoState, revision: str) -> str:
    if revision in state.branches:
        return state.branches[revision]
    for pull in state.pulls:
        if revision == f"refs/pr/{pull.number}":
            return pull.head
    raise RevisionNotFound(revision)


def _move(state: RepoState, revision: str, oid: str) -> RepoState:
    if revision in state.branches:
        return replace(state, branches={**state.branches, revision: oid})
    pulls = tuple(replace(pull, head=oid) if revision == f"refs/pr/{pull.number}" else pull for pull in state.pulls)
    return replace(state, pulls=pulls)


def _apply(before: Mapping[str, Entry], changes: Iterable[Change]) -> dict[str, Entry]:
    files = dict(before)
    for change in changes:
        check_path(change.path)
        match change:
            case AddFile(path, entry):
                files[path] = entry
            case DeleteFile(path):
                if files.pop(path, None) is None:
                    raise EntryNotFound(f"A file with this name doesn't exist: {path}")
            case DeleteFolder(path):
                inside = [name for name in files if name.startswith(path + "/")]
                if not inside:
                    raise EntryNotFound(f"A folder with this name doesn't exist: {path}")
                for name in inside:
                    del files[name]
    for path in files:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in files:
                raise HubError(400, f"{parent} cannot be both a file and a folder")
            parent = parent.rpartition("/")[0]
    return dict(sorted(files.items()))


def _tracked(objects: Objects, before: Mapping[str, Entry], files: dict[str, Entry]) -> dict[str, Entry]:
    """``files`` with every new LFS file listed in .gitattributes, as the Hub does."""
    entry = files.get(".gitattributes")
    # A replaced .gitattributes must still list the existing LFS files.
    old_files = before if entry == before.get(".gitattributes") else {}
    added = [path for path, new in files.items() if new.sha256 and old_files.get(path) != new]
    if entry is not None and entry.sha256 is not None:
        return files
    old_text = objects.read(entry).decode("utf-8", "replace") if entry else ""
    text = track(old_text, added)
    if text == old_text:
        return files
    return dict(sorted({**files, ".gitattributes": objects.put_blob(text.encode())}.items()))


def _write_commit(objects: Objects, files: Mapping[str, Entry], new: NewCommit, parents: tuple[str, ...]) -> Commit:
    tree = tree_ids(files)[""]
    date = datetime.now(UTC).replace(microsecond=0)
    message = f"{new.title}\n\n{new.description}" if new.description else new.title
    commit = Commit(
        id=commit_id(tree, parents, new.author, int(date.timestamp()), message),
        tree=tree,
        parents=parents,
        title=new.title,
        description=new.description,
        author=new.author,
        date=date.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
    )
    objects.put_tree(tree, files)
    objects.put_commit(commit)
    return commit


def _refuse_existing(refs: Mapping[str, str], name: str) -> None:
    if name in refs:
        raise HubError(409, f"Reference already exists: {name}")


def _without(refs: Mapping[str, str], name: str) -> dict[str, str]:
    return {other: oid for other, oid in refs.items() if other != name}
