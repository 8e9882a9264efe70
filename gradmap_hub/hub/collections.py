"""Adds published repositories to a collection of their owner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradmap_hub.errors import CollectionNotFound, NotAllowed, UsageError
from gradmap_hub.hub.accounts import Account
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.refusals import step

_TITLE_LIMIT = 60
# The Hub appends this to the title to make the slug.
_SLUG_ID = re.compile(r"-[0-9a-f]{24}$")


@dataclass(frozen=True)
class CollectionLink:
    """A collection that the published repositories were added to."""

    slug: str
    url: str


@dataclass(frozen=True)
class CollectionName:
    """A collection as the user names it. `name`: the last part of its slug, or its title."""

    owner: str
    name: str

    @property
    def is_slug(self) -> bool:
        return bool(_SLUG_ID.search(self.name))


def parse_collection(text: str, account: Account) -> CollectionName:
    """Parse OWNER/SLUG, OWNER/TITLE, or TITLE in the user's own account.

    Raises:
        UsageError: the name is empty, or too long for a title.
        NotAllowed: the account may not write to collections of the owner.
    """
    owner, slash, name = text.partition("/")
    if not slash:
        owner, name = account.name, text
    owner, name = owner.strip(), name.strip()
    if not owner or not name or len(name) > _TITLE_LIMIT + 25:
        raise UsageError(f"--collection takes OWNER/SLUG or [OWNER/]TITLE of at most 60 characters; got {text!r}.")
    collection = CollectionName(owner, name)
    if not collection.is_slug and len(name) > _TITLE_LIMIT:
        raise UsageError(f"The title of a collection has at most {_TITLE_LIMIT} characters; got {len(name)}.")
    if owner != account.name and owner not in account.organizations:
        raise NotAllowed(
            f"You are {account.name}, without write access to collections of {owner}.",
            hint=f"Use --collection '{account.name}/{name}', or ask to join {owner}.",
        )
    if not account.covers_owner(owner, "collection.write"):
        raise NotAllowed(
            f"Your fine-grained token does not cover collections of {owner}.",
            hint=f"Give it write access to collections of {owner} (collection.write), or leave out --collection.",
        )
    return collection


def check_collection(hub: Hub, text: str, account: Account) -> str:
    """Look for the collection before any work; returns its slug, or a sentence that it does not exist yet.

    Raises:
        UsageError, NotAllowed: see `parse_collection`.
        CollectionNotFound: the slug does not exist.
        RateLimited, HubError
    """
    collection = parse_collection(text, account)
    slug = _find(hub, collection)
    return slug if slug else f"{collection.owner}/{collection.name} does not exist yet; it is created private"


def add_to_collection(
    hub: Hub, text: str, account: Account, items: Sequence[tuple[str, Literal["model", "space"]]]
) -> CollectionLink:
    """Add repositories to the collection, created private if missing; existing items stay.

    Raises:
        UsageError, NotAllowed: see `parse_collection`.
        CollectionNotFound: the slug does not exist.
        RateLimited, HubError
    """
    collection = parse_collection(text, account)
    slug = _find(hub, collection)
    if slug is None:
        made = step(
            hub,
            "create the collection",
            f"{collection.owner}/{collection.name}",
            lambda: hub.api.create_collection(
                collection.name, namespace=collection.owner, private=True, exists_ok=True
            ),
        )
        slug = made.slug
    for repo_id, kind in items:

        def add(repo_id: str = repo_id, kind: Literal["model", "space"] = kind, slug: str = slug) -> None:
            hub.api.add_collection_item(slug, repo_id, kind, exists_ok=True)

        step(hub, f"add {repo_id} to the collection", slug, add)
    return CollectionLink(slug, f"{hub.endpoint}/collections/{slug}")


def _find(hub: Hub, collection: CollectionName) -> str | None:
    """The slug of the collection; None if it does not exist and the name is a title.

    Raises:
        CollectionNotFound: the slug does not exist.
        RateLimited, HubError
    """
    found = step(
        hub,
        "read the collections of",
        collection.owner,
        lambda: [(entry.slug, entry.title) for entry in hub.api.list_collections(owner=collection.owner)],
    )
    for slug, title in found:
        if slug == f"{collection.owner}/{collection.name}" or title == collection.name:
            return slug
    if collection.is_slug:
        raise CollectionNotFound(
            f"The collection {collection.owner}/{collection.name} does not exist, or you cannot see it.",
            hint="Give its whole slug, as in its URL, or a title; a title that does not exist is created.",
        )
    return None
