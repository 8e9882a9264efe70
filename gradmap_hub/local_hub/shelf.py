"""Collections: named lists of repositories and papers, stored in one file."""

import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import HubError
from .objects import write_atomically

ItemType = Literal["model", "dataset", "space", "paper", "collection"]

ITEM_TYPES: tuple[ItemType, ...] = get_args(ItemType)


@dataclass(frozen=True)
class Item:
    internal_id: str
    id: str
    type: ItemType
    note: str | None


@dataclass(frozen=True)
class Collection:
    """A collection. ``slug`` is ``owner/title-in-lower-case-id``."""

    slug: str
    title: str
    owner: str
    private: bool
    updated_at: str
    description: str | None = None
    items: tuple[Item, ...] = ()


class CollectionExists(HubError):
    """The owner already has a collection with this title; the client reads its slug from the response."""

    def __init__(self, slug: str) -> None:
        super().__init__(409, "A collection with this title already exists", body={"slug": slug})


class Shelf:
    """The collections of a hub. Thread-safe."""

    def __init__(self, root: Path, temporary: Path) -> None:
        self._file = root / "collections.json"
        self._temporary = temporary
        self._lock = threading.RLock()

    def all(self) -> list[Collection]:
        """All collections, oldest first."""
        try:
            rows: list[dict[str, Any]] = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return []
        return [Collection(**{**row, "items": tuple(Item(**item) for item in row["items"])}) for row in rows]

    def get(self, slug: str) -> Collection:
        """The collection with this slug.

        Raises:
            HubError: 404, the collection does not exist.
        """
        for collection in self.all():
            if collection.slug == slug:
                return collection
        raise HubError(404, "Collection not found")

    def add(self, title: str, owner: str, private: bool, description: str | None, now: str) -> Collection:
        """Create a collection.

        Raises:
            CollectionExists: the owner already has a collection with this title.
        """
        with self._lock:
            collections = self.all()
            for other in collections:
                if (other.owner, other.title) == (owner, title):
                    raise CollectionExists(other.slug)
            words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            slug = f"{owner}/{words}-{secrets.token_hex(12)}"
            made = Collection(slug, title, owner, private, now, description)
            self._write([*collections, made])
            return made

    def add_item(self, slug: str, item_id: str, item_type: ItemType, note: str | None, now: str) -> Collection:
        """Add an item and return the updated collection.

        Raises:
            HubError: 404, the collection does not exist; 409, it already contains the item.
        """

        def change(collection: Collection) -> Collection:
            if any((item.id, item.type) == (item_id, item_type) for item in collection.items):
                raise HubError(409, "The collection already contains this item")
            item = Item(secrets.token_hex(12), item_id, item_type, note)
            return replace(collection, items=(*collection.items, item), updated_at=now)

        return self._update(slug, change)

    def _update(self, slug: str, change: Callable[[Collection], Collection]) -> Collection:
        with self._lock:
            changed = change(self.get(slug))
            self._write([changed if each.slug == slug else each for each in self.all()])
            return changed

    def _write(self, collections: list[Collection]) -> None:
        text = json.dumps([asdict(collection) for collection in collections], indent=1)
        write_atomically(self._file, text.encode(), self._temporary)
