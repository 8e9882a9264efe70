"""Putting what was published into a collection of its owner."""

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
# What the Hub puts behind the title to make a slug of it.
_SLUG_ID = re.compile(r"-[0-9a-f]{24}$")


@dataclass(frozen=True)
class Collected:
    """A collection that holds what was published."""

    slug: str
    url: str


@dataclass(frozen=True)
class Wanted:
    """A collection as the user names it: by the last part of its slug, or by its title."""

    owner: str
    name: str

    @property
    def is_slug(self) -> bool:
        return bool(_SLUG_ID.search(self.name))


def wanted_collection(text: str, account: Account) -> Wanted:
    """OWNER/SLUG, OWNER/TITLE, or TITLE in the user's own account.

    Raises:
        UsageError: no name, or too long for a title.
        NotAllowed: an owner that this account may not write to.
    """
    owner, slash, name = text.partition("/")
    if not slash:
        owner, name = account.name, text
    owner, name = owner.strip(), name.strip()
    if not owner or not name or len(name) > _TITLE_LIMIT + 25:
        raise UsageError(f"--collection takes OWNER/SLUG or [OWNER/]TITLE of at most 60 characters; got {text!r}.")
    wanted = Wanted(owner, name)
    if not wanted.is_slug and len(name) > _TITLE_LIMIT:
        raise UsageError(f"The title of a collection has at most {_TITLE_LIMIT} characters; got {len(name)}.")
    if owner != account.name and owner not in account.organizations:
        raise NotAllowed(
            f"You are {account.name} and may not write to collections of {owner}.",
            hint=f"Use --collection '{account.name}/{name}', or ask for membership of {owner}.",
        )
    if not account.covers_owner(owner, "collection.write"):
        raise NotAllowed(
            f"Your fine-grained token does not cover collections of {owner}.",
            hint=f"Give it write access to collections of {owner} (collection.write), or leave out --collection.",
        )
    return wanted


def check_collection(hub: Hub, text: str, account: Account) -> str:
    """Look for the collection before any work; says what there is.

    Raises:
        UsageError, NotAllowed: see `wanted_collection`.
        CollectionNotFound: a slug that is not there.
        RateLimited, HubError
    """
    wanted = wanted_collection(text, account)
    slug = _find(hub, wanted)
    return slug if slug else f"{wanted.owner}/{wanted.name} is not there yet; it is created private"


def add_to_collection(
    hub: Hub, text: str, account: Account, items: Sequence[tuple[str, Literal["model", "space"]]]
) -> Collected:
    """Add repositories to the collection, which is created private if there is none; what is in it stays so.

    Raises:
        UsageError, NotAllowed, CollectionNotFound, RateLimited, HubError
    """
    wanted = wanted_collection(text, account)
    slug = _find(hub, wanted)
    if slug is None:
        made = step(
            hub,
            "create the collection",
            f"{wanted.owner}/{wanted.name}",
            lambda: hub.api.create_collection(wanted.name, namespace=wanted.owner, private=True, exists_ok=True),
        )
        slug = made.slug
    for repo_id, kind in items:

        def add(repo_id: str = repo_id, kind: Literal["model", "space"] = kind, slug: str = slug) -> None:
            hub.api.add_collection_item(slug, repo_id, kind, exists_ok=True)

        step(hub, f"add {repo_id} to the collection", slug, add)
    return Collected(slug, f"{hub.endpoint}/collections/{slug}")


def _find(hub: Hub, wanted: Wanted) -> str | None:
    """The slug of the collection; None if it is to be created."""
    found = step(
        hub,
        "read the collections of",
        wanted.owner,
        lambda: [(entry.slug, entry.title) for entry in hub.api.list_collections(owner=wanted.owner)],
    )
    for slug, title in found:
        if slug == f"{wanted.owner}/{wanted.name}" or title == wanted.name:
            return slug
    if wanted.is_slug:
        raise CollectionNotFound(
            f"There is no collection {wanted.owner}/{wanted.name} that you can see.",
            hint="Give its whole slug, as in its address, or a title: one that is not there is created.",
        )
    return None
