"""Repository info, tree, paths, refs and history; branches and tags."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..context import Call, Hub, answer
from ..errors import EntryNotFound, HubError
from ..foreign import whole_number
from ..metadata import expanded, repo_info, tree_rows
from ..names import PLURALS, RepoKey, check_path
from ..objects import Commit
from ..routing import RouteMaker
from ..store import last_commits

_Row = TypeVar("_Row")


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, plural in PLURALS.items():
        make = RouteMaker(hub, repo_type)
        address = f"/api/{plural}/{{namespace}}/{{name}}"
        found += [
            make.route("repo-list", f"/api/{plural}", list_repos),
            make.route("repo-info", address, info),
            make.route("repo-info", f"{address}/revision/{{revision}}", info),
            make.route("tree", f"{address}/tree/{{revision}}", tree),
            make.route("tree", f"{address}/tree/{{revision}}/{{path:path}}", tree),
            make.route("paths-info", f"{address}/paths-info/{{revision}}", paths_info, "POST"),
            make.route("refs", f"{address}/refs", refs),
            make.route("commits", f"{address}/commits/{{revision}}", commits),
            make.route("branch", f"{address}/branch/{{branch}}", create_branch, "POST"),
            make.route("branch", f"{address}/branch/{{branch}}", delete_branch, "DELETE"),
            make.route("tag", f"{address}/tag/{{revision}}", create_tag, "POST"),
            make.route("tag", f"{address}/tag/{{revision}}", delete_tag, "DELETE"),
        ]
    return found


def list_repos(call: Call) -> Response:
    query = call.http.query_params
    rows: list[dict[str, Any]] = []
    for key in call.hub.store.keys(call.repo_type):
        if query.get("author", key.namespace) != key.namespace or query.get("search", "").lower() not in key.id.lower():
            continue
        try:
            state = call.visible(key)
            row = repo_info(call.hub.store, key, state, state.branches["main"])
        except (HubError, FileNotFoundError):  # not visible, or deleted since it was listed
            continue
        rows.append({name: value for name, value in row.items() if query.get("full") or name != "siblings"})
    return answer(rows[: whole_number(query.get("limit"), len(rows))])


def info(call: Call) -> Response:
    key = call.key()
    state = call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision") if "revision" in call.http.path_params else "main")
    found = repo_info(call.hub.store, key, state, oid, blobs=_flag(call, "blobs"))
    if _flag(call, "securityStatus"):
        found["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
    wanted = call.http.query_params.getlist("expand") + call.http.query_params.getlist("expand[]")
    if wanted:
        # With expand, the Hub returns only the listed fields.
        found = {name: value for name, value in found.items() if name in {"_id", "id", *wanted}}
    return answer(found)


def tree(call: Call) -> Response:
    key = call.key()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    rows = tree_rows(call.hub.store.files(key, oid))
    folder = ""
    if call.http.path_params.get("path"):
        folder = call.path()
        if folder not in rows:
            raise EntryNotFound(f"{folder} does not exist on {call.param('revision')!r}", oid)
        if rows[folder]["type"] == "file":
            return answer([rows[folder]])
        folder += "/"
    recursive = _flag(call, "recursive")
    inside = [
        row for path, row in rows.items() if path.startswith(folder) and (recursive or "/" not in path[len(folder) :])
    ]
    page, headers = _page(call, inside)
    return answer(_expand(call, key, oid, page, _flag(call, "expand")), headers)


def paths_info(call: Call) -> Response:
    key = call.key()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    if call.http.headers.get("content-type", "").startswith("application/json"):
        payload = call.json()
        paths, expand = payload.get("paths", []), payload.get("expand") is True
    else:
        form = parse_qs(call.body.decode("utf-8", "replace"))
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() in ("true", "1")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise HubError(400, "paths must be strings")
    rows = tree_rows(call.hub.store.files(key, oid))
    found = [rows[path] for path in dict.fromkeys(check_path(path.strip("/")) for path in paths) if path in rows]
    return answer(_expand(call, key, oid, found, expand))


def refs(call: Call) -> Response:
    state = call.visible(call.key())
    found: dict[str, Any] = {
        "branches": [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in state.branches.items()
        ],
        "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in state.tags.items()],
        "converts": [],
    }
    if _flag(call, "include_prs"):
        found["pullRequests"] = [
            {"name": f"pr/{pull.number}", "ref": f"refs/pr/{pull.number}", "targetCommit": pull.head}
            for pull in state.pulls
        ]
    return answer(found)


def commits(call: Call) -> Response:
    key = call.key()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    history = list(call.hub.store.history(key, oid))
    page, headers = _page(call, history)
    formatted = "formatted" in call.http.query_params.getlist("expand[]")
    headers["X-Total-Count"] = str(len(history))
    return answer([_commit_row(commit, formatted) for commit in page], headers)


def create_branch(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    start = call.json().get("startingPoint") if call.body else None
    call.hub.store.create_branch(key, call.param("branch"), start if isinstance(start, str) else None)
    return PlainTextResponse("OK")


def delete_branch(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    call.hub.store.delete_branch(key, call.param("branch"))
    return PlainTextResponse("OK")


def create_tag(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    name = call.json().get("tag")
    if not isinstance(name, str):
        raise HubError(400, "tag must be a string")
    call.hub.store.create_tag(key, name, call.param("revision"))
    return PlainTextResponse("OK")


def delete_tag(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    call.hub.store.delete_tag(key, call.param("revision"))
    return PlainTextResponse("OK")


def _flag(call: Call, name: str) -> bool:
    return call.http.query_params.get(name, "").lower() in ("true", "1")


def _page(call: Call, rows: Sequence[_Row]) -> tuple[list[_Row], dict[str, str]]:
    """One page of rows and the Link header of the next page."""
    query = dict(call.http.query_params)
    start = whole_number(query.get("cursor"), 0)
    end = start + call.hub.page_size
    if end >= len(rows):
        return list(islice(rows, start, None)), {}
    url = f"{call.base_url}{call.http.scope['raw_path'].decode('ascii')}?{urlencode({**query, 'cursor': end})}"
    return list(rows[start:end]), {"Link": f'<{url}>; rel="next"'}


def _expand(call: Call, key: RepoKey, oid: str, rows: Iterable[dict[str, Any]], wanted: bool) -> list[dict[str, Any]]:
    rows = list(rows)
    if not wanted:
        return rows
    last = last_commits(call.hub.store, key, oid, (row["path"] for row in rows))
    return [expanded(row, last[row["path"]]) for row in rows]


def _commit_row(commit: Commit, formatted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": commit.id,
        "title": commit.title,
        "message": commit.description,
        "date": commit.date,
        "authors": [{"user": commit.author, "avatar": ""}],
    }
    if formatted:
        # Escaped plain text is valid HTML; the Hub's own formatting is not documented.
        row["formatted"] = {"title": _escaped(commit.title), "message": _escaped(commit.description)}
    return row


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
