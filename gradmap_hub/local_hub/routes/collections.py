"""Create, list and read collections, and add items."""

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from ..auth import can_see
from ..context import Call, Hub, answer
from ..errors import Forbidden, HubError
from ..foreign import whole_number
from ..names import parse_repo_id
from ..routing import RouteMaker
from ..shelf import ITEM_TYPES, Collection, Item
from ..store import now

_TITLE_LIMIT = 60
#: The list shows at most this many items per collection.
_LISTED_ITEMS = 4


def routes(hub: Hub) -> list[Route]:
    make = RouteMaker(hub)
    slug = "/api/collections/{namespace}/{name}"
    return [
        make.route("collections", "/api/collections", list_collections),
        make.route("collections", "/api/collections", create_collection, "POST"),
        make.route("collections", slug, get_collection),
        make.route("collections", f"{slug}/items", add_item, "POST"),
    ]


def list_collections(call: Call) -> Response:
    query = call.http.query_params
    owners, wanted = query.getlist("owner"), query.getlist("item")
    rows: list[dict[str, Any]] = []
    for collection in reversed(call.hub.shelf.all()):
        items = _visible_items(call, collection)
        # The client names items as "models/owner/name".
        names = {f"{item.type}s/{item.id}" for item in items}
        if not _visible(call, collection) or (owners and collection.owner not in owners):
            continue
        if not wanted or names & set(wanted):
            row = _json(call, collection, items[:_LISTED_ITEMS])
            # The client sets the position itself and fails if the response contains one.
            rows.append({name: value for name, value in row.items() if name != "position"})
    return answer(rows[: whole_number(query.get("limit"), len(rows))])


def create_collection(call: Call) -> Response:
    payload = call.json()
    user = call.user()
    title, owner = payload.get("title"), payload.get("namespace") or user.name
    private, description = payload.get("private", False), payload.get("description")
    if not isinstance(title, str) or not 0 < len(title.strip()) <= _TITLE_LIMIT:
        raise HubError(400, f"title must have 1 to {_TITLE_LIMIT} characters")
    if not isinstance(owner, str) or not isinstance(private, bool) or not isinstance(description, str | None):
        raise HubError(400, "namespace and description must be strings, private true or false")
    if not user.can_create(owner, "collection.write"):
        raise Forbidden
    made = call.hub.shelf.add(title.strip(), owner, private, description, now())
    return answer(_json(call, made, made.items))


def get_collection(call: Call) -> Response:
    collection = _asked(call)
    return answer(_json(call, collection, _visible_items(call, collection)))


def add_item(call: Call) -> Response:
    collection = _asked(call)
    if not call.user().can_create(collection.owner, "collection.write"):
        raise Forbidden
    payload = call.json()
    item, note = payload.get("item"), payload.get("note")
    if not isinstance(item, dict) or not isinstance(item.get("id"), str) or item.get("type") not in ITEM_TYPES:
        raise HubError(400, f"item needs an id and a type, which is one of {', '.join(ITEM_TYPES)}")
    if not isinstance(note, str | None):
        raise HubError(400, "note must be a string")
    if not _item_exists(call, item["id"], item["type"]):
        raise HubError(404, f"The {item['type']} {item['id']} does not exist")
    changed = call.hub.shelf.add_item(collection.slug, item["id"], item["type"], note, now())
    return answer(_json(call, changed, _visible_items(call, changed)))


def _asked(call: Call) -> Collection:
    collection = call.hub.shelf.get(f"{call.param('namespace')}/{call.param('name')}")
    if not _visible(call, collection):
        raise HubError(404, "Collection not found")
    return collection


def _visible(call: Call, collection: Collection) -> bool:
    if not collection.private:
        return True
    return call.identity is not None and call.identity.is_member(collection.owner)


def _visible_items(call: Call, collection: Collection) -> list[Item]:
    return [item for item in collection.items if _item_exists(call, item.id, item.type)]


def _item_exists(call: Call, item_id: str, item_type: str) -> bool:
    """Whether the item exists and this caller may see it. Papers are not checked."""
    if item_type == "paper":
        return True
    try:
        if item_type == "collection":
            return _visible(call, call.hub.shelf.get(item_id))
        key = parse_repo_id(item_id, item_type)
        return can_see(call.identity, key, call.hub.store.state(key))
    except HubError:
        return False


def _json(call: Call, collection: Collection, items: Sequence[Item]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "slug": collection.slug,
        "title": collection.title,
        "owner": {"name": collection.owner, "fullname": collection.owner, "avatarUrl": ""},
        "items": [_item(item, position) for position, item in enumerate(items)],
        "lastUpdated": collection.updated_at,
        "position": 0,
        "private": collection.private,
        "theme": "blue",
        "upvotes": 0,
        "shareUrl": f"{call.base_url}/collections/{collection.slug}",
    }
    return {**row, "description": collection.description} if collection.description else row


def _item(item: Item, position: int) -> dict[str, Any]:
    row: dict[str, Any] = {"_id": item.internal_id, "id": item.id, "type": item.type, "position": position}
    if item.type == "collection":
        row["slug"] = item.id
    return {**row, "note": {"text": item.note}} if item.note else row
