"""Copy a local folder into a repository without HTTP."""

from collections.abc import Iterator
from pathlib import Path

from .gitids import Entry, lfs_entry
from .names import RepoKey, check_path
from .objects import Objects, hash_file, read_chunks
from .patterns import default_attributes, upload_mode
from .store import AddFile, Change, DeleteFile, NewCommit, Store

_SKIPPED_FOLDERS = frozenset({".git", "__pycache__"})
_SAMPLE = 512


def seed_folder(store: Store, key: RepoKey, folder: Path) -> str:
    """Replace the files of a repository with those of ``folder`` in one commit; return the id of the head.

    If nothing differs, no commit is made. Files are copied, not hard-linked: stored objects must never change.

    Raises:
        InvalidName: the Hub would refuse a file name.
        NotADirectoryError: ``folder`` is not a directory.
    """
    if not folder.is_dir():
        raise NotADirectoryError(folder)
    objects = store.objects(key)
    attributes_file = folder / ".gitattributes"
    attributes = attributes_file.read_text("utf-8") if attributes_file.is_file() else default_attributes(key.type)
    title = folder.name.encode("utf-8", "replace").decode()
    with store.lock(key):
        before = store.files(key, store.resolve(key, "main"))
        wanted = {path: _store_file(objects, attributes, path, file) for path, file in _walk(folder)}
        changes: list[Change] = [AddFile(path, entry) for path, entry in wanted.items() if before.get(path) != entry]
        # The hub's own .gitattributes stays unless the folder has one.
        changes += [DeleteFile(path) for path in before if path not in wanted and path != ".gitattributes"]
        return store.commit(key, "main", NewCommit(f"Seed from {title}", key.namespace, tuple(changes))).oid


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        # Metadata of git and huggingface_hub.
        if _SKIPPED_FOLDERS & set(relative.parts) or relative.parts[:2] == (".cache", "huggingface"):
            continue
        if file.is_file():
            yield check_path(relative.as_posix()), file


def _store_file(objects: Objects, attributes: str, path: str, file: Path) -> Entry:
    size = file.stat().st_size
    with file.open("rb") as opened:
        sample = opened.read(_SAMPLE)
    if upload_mode(attributes, path, size, sample) == "regular":
        return objects.put_blob(file.read_bytes())
    sha256 = hash_file(file)
    if not objects.has_lfs(sha256):
        objects.put_lfs(read_chunks(file), sha256, size)
    return lfs_entry(sha256, size)
