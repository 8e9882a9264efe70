"""Pull requests as discussions: open, list, read, close. Merging and comments are not implemented."""

from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from ..context import Call, Hub, answer
from ..errors import HubError
from ..foreign import whole_number
from ..names import PLURALS, RepoKey
from ..routing import RouteMaker
from ..store import PullRequest, RepoState, now

_PAGE = 50


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, plural in PLURALS.items():
        make = RouteMaker(hub, repo_type)
        address = f"/api/{plural}/{{namespace}}/{{name}}/discussions"
        found += [
            make.route("discussions", address, list_discussions),
            make.route("discussions", address, create_discussion, "POST"),
            make.route("discussions", f"{address}/{{number}}", get_discussion),
            make.route("discussions", f"{address}/{{number}}/status", change_status, "POST"),
        ]
    return found


def list_discussions(call: Call) -> Response:
    key = call.key()
    state = call.visible(key)
    query = call.http.query_params
    # Newest first. All discussions are pull requests.
    found = [pull for pull in reversed(state.pulls) if query.get("author") in (None, pull.author)]
    closed = sum(pull.status == "closed" for pull in found)
    if query.get("status") in ("open", "closed"):
        found = [pull for pull in found if (pull.status == "closed") == (query["status"] == "closed")]
    if query.get("type") == "discussion":
        found = []
    start = whole_number(query.get("p"), 0) * _PAGE
    rows = [_row(key, state, pull) for pull in found[start : start + _PAGE]]
    return answer({"discussions": rows, "count": len(found), "start": start, "numClosedDiscussions": closed})


def create_discussion(call: Call) -> Response:
    key = call.key()
    user = call.contributor(key)
    payload = call.json()
    title, description = payload.get("title"), payload.get("description", "")
    if not isinstance(title, str) or len(title.strip()) < 3 or not isinstance(description, str):
        raise HubError(400, "A discussion needs a title of at least three characters and a description")
    if payload.get("pullRequest") is not True:
        raise HubError(400, "Only pull requests are supported, not plain discussions")
    pull = call.hub.store.open_pull_request(key, title.strip(), user.name, description)
    return answer({**_row(key, call.hub.store.state(key), pull), "url": _page_url(call, key, pull)})


def get_discussion(call: Call) -> Response:
    key = call.key()
    state = call.visible(key)
    pull = _asked(call, state)
    return answer(
        {
            **_row(key, state, pull),
            "url": _page_url(call, key, pull),
            "events": _events(call, key, state, pull),
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        }
    )


def change_status(call: Call) -> Response:
    """Close or reopen a pull request. Allowed for its author and for users with write access."""
    key = call.key()
    user = call.contributor(key)
    pull = _asked(call, call.hub.store.state(key))
    if user.name != pull.author:
        call.writable(key)
    wanted = call.json().get("status")
    if wanted not in ("open", "closed"):
        raise HubError(400, "status must be open or closed")
    changed = replace(pull, status=wanted)

    def change(state: RepoState) -> RepoState:
        return replace(state, pulls=tuple(changed if each.number == pull.number else each for each in state.pulls))

    call.hub.store.update(key, change)
    event = {
        "id": f"{key.id}#{pull.number}-{wanted}",
        "type": "status-change",
        "createdAt": now(),
        "author": {"name": user.name},
        "data": {"status": wanted},
    }
    return answer({"newStatus": event})


def _asked(call: Call, state: RepoState) -> PullRequest:
    number = call.param("number")
    pull = next((pull for pull in state.pulls if str(pull.number) == number), None)
    if pull is None:
        raise HubError(404, "Discussion not found")
    return pull


def _row(key: RepoKey, state: RepoState, pull: PullRequest) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.created_at or state.created_at,
        "status": pull.status,
        "isPullRequest": True,
        "repo": {"name": key.id, "type": key.type},
        "numComments": 1,
        "pinned": False,
    }


def _events(call: Call, key: RepoKey, state: RepoState, pull: PullRequest) -> list[dict[str, Any]]:
    """The description, then the commits that are not in ``main``, oldest first."""
    created = pull.created_at or state.created_at
    store = call.hub.store
    told: dict[str, Any] = {"raw": pull.description, "html": "", "updatedAt": created, "author": {"name": pull.author}}
    comment: dict[str, Any] = {
        "id": f"{key.id}#{pull.number}",
        "type": "comment",
        "createdAt": created,
        "author": {"name": pull.author},
        "data": {"edited": False, "hidden": False, "latest": told, "history": [told]},
    }
    known = {commit.id for commit in store.history(key, state.branches["main"])}
    commits: list[dict[str, Any]] = []
    for commit in store.history(key, pull.head):
        if commit.id in known:
            break
        commits.append(
            {
                "id": commit.id,
                "type": "commit",
                "createdAt": commit.date,
                "author": {"name": commit.author},
                "data": {"subject": commit.title, "oid": commit.id},
            }
        )
    return [comment, *reversed(commits)]


def _page_url(call: Call, key: RepoKey, pull: PullRequest) -> str:
    return f"{call.base_url}/{key.address}/discussions/{pull.number}"
