"""Preupload and commit. The LFS upload between the two is in :mod:`.lfs`."""

import base64
import binascii
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

from gradmap_hub.files import parse_json

from ..auth import Identity
from ..context import Call, Hub, answer, objects_in
from ..errors import Forbidden, HubError
from ..gitids import lfs_entry
from ..names import PLURALS, RepoKey, check_path, is_sha256
from ..patterns import REGULAR_LIMIT, default_attributes, is_ignored, upload_mode
from ..routing import RouteMaker
from ..store import AddFile, Change, DeleteFile, DeleteFolder, NewCommit

_PARENT = re.compile(r"[0-9a-fA-F]{5,40}")
#: One line of a commit contains one regular file in base64.
_LINE_LIMIT = REGULAR_LIMIT * 4 // 3 + 64 * 1024


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, plural in PLURALS.items():
        make = RouteMaker(hub, repo_type)
        api = f"/api/{plural}/{{namespace}}/{{name}}"
        found += [
            make.route("preupload", f"{api}/preupload/{{revision}}", preupload, "POST"),
            make.streaming_route("commit", f"{api}/commit/{{revision}}", commit, "POST"),
        ]
    return found


def preupload(call: Call) -> Response:
    key = call.key()
    _proposer(call, key)
    store = call.hub.store
    oid = store.resolve(key, call.param("revision"))
    files = store.files(key, oid)
    objects = store.objects(key)

    def text(path: str, default: str) -> str:
        return objects.read(files[path]).decode("utf-8", "replace") if path in files else default

    payload = call.json()
    attributes = text(".gitattributes", default_attributes(key.type))
    ignore = payload.get("gitIgnore")
    if not isinstance(ignore, str):
        ignore = text(".gitignore", "")
    rows: list[dict[str, Any]] = []
    for asked in objects_in(payload, "files"):
        path, size = asked.get("path"), asked.get("size")
        if not isinstance(path, str) or not isinstance(size, int):
            raise HubError(400, "files need a path and a size")
        sample = _decoded(asked.get("sample", ""))
        row: dict[str, Any] = {
            "path": check_path(path),
            "uploadMode": upload_mode(attributes, path, size, sample),
            "shouldIgnore": is_ignored(ignore, path),
        }
        if path in files:
            # The client compares this with the hash of its file: SHA-256 for LFS, else the git blob id.
            row["oid"] = files[path].etag
        rows.append(row)
    return answer({"files": rows, "commitOid": oid})


async def commit(call: Call) -> Response:
    key = call.key()
    user = await run_in_threadpool(_committer, call, key)
    # While the body arrives, the repository may be deleted and another one may take its name.
    repository = (await run_in_threadpool(call.hub.store.state, key)).internal_id
    header: dict[str, Any] | None = None
    changes: list[Change] = []
    async for line in _lines(call.http.stream()):
        row = _parsed(line)
        if row["key"] == "header":
            header = row["value"]
        else:
            changes.append(await run_in_threadpool(_change, call, key, row["key"], row["value"]))
    if header is None or not isinstance(header.get("summary"), str) or not header["summary"].strip():
        raise HubError(400, "A commit needs a header with a summary")
    parent = header.get("parentCommit")
    if parent is not None and not (isinstance(parent, str) and _PARENT.fullmatch(parent)):
        raise HubError(400, "parentCommit must be a commit id")
    new = NewCommit(
        title=header["summary"].replace("\x00", ""),
        description=str(header.get("description") or "").replace("\x00", ""),
        author=user.name,
        changes=tuple(changes),
        parent=parent,
        create_pr=_creates_pr(call),
        into=repository,
    )
    made = await run_in_threadpool(call.hub.store.commit, key, call.param("revision"), new)
    page = f"{call.base_url}/{key.address}"
    body = {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": f"{page}/commit/{made.oid}",
        "hookOutput": "",
    }
    if made.pull_request is not None:
        body["pullRequestUrl"] = f"{page}/discussions/{made.pull_request}"
    return answer(body)


def _creates_pr(call: Call) -> bool:
    return call.http.query_params.get("create_pr", "").lower() in ("1", "true")


def _proposer(call: Call, key: RepoKey) -> Identity:
    return call.contributor(key) if _creates_pr(call) else _committer(call, key)


def _committer(call: Call, key: RepoKey) -> Identity:
    """The user, if they may commit to the revision of this call or open a pull request.

    Raises:
        RepoNotFound, Unauthorized, Forbidden
    """
    user = call.contributor(key)
    if user.can_write(key) or _creates_pr(call):
        return user
    pulls = call.hub.store.state(key).pulls
    if any(call.param("revision") == f"refs/pr/{pull.number}" and pull.author == user.name for pull in pulls):
        return user
    raise Forbidden


async def _lines(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The non-empty lines of a body; holds one line in memory at a time."""
    pending = bytearray()
    async for chunk in stream:
        searched = len(pending)
        pending += chunk
        while (end := pending.find(b"\n", searched)) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            searched = 0
            if line.strip():
                yield line
        if len(pending) > _LINE_LIMIT:
            raise HubError(413, "A file above 10 MB must be uploaded with LFS")
    if pending.strip():
        yield bytes(pending)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line, finite=True)
    except ValueError as error:
        raise HubError(400, f"A line of the commit is not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("value"), dict):
        raise HubError(400, "A line of the commit must have a key and a value")
    return row


def _change(call: Call, key: RepoKey, kind: str, value: dict[str, Any]) -> Change:
    path = value.get("path")
    if not isinstance(path, str):
        raise HubError(400, f"{kind} needs a path")
    objects = call.hub.store.objects(key)
    match kind:
        case "file":
            return AddFile(check_path(path), objects.put_blob(_decoded(value.get("content", ""), value)))
        case "lfsFile":
            # Content is named by its hash. Somebody without access to a gated repository could name its weights in a
            # pull request and read them there.
            call.readable(key)
            oid = value.get("oid")
            size = objects.lfs_size(oid) if isinstance(oid, str) and is_sha256(oid) else None
            if not isinstance(oid, str) or size is None:
                raise HubError(
                    400,
                    f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}",
                )
            # Copies of files that are already on the Hub have no size.
            if value.get("size", size) != size:
                raise HubError(400, f"{path} has {size} bytes, not {value['size']}")
            return AddFile(check_path(path), lfs_entry(oid, size))
        case "deletedFile":
            return DeleteFile(check_path(path))
        case "deletedFolder":
            return DeleteFolder(check_path(path.rstrip("/")))
        case _:
            raise HubError(400, f"Unknown operation {kind!r}")


def _decoded(content: object, value: dict[str, Any] | None = None) -> bytes:
    if not isinstance(content, str):
        raise HubError(400, "The content of a file must be a string")
    if value is not None and value.get("encoding", "utf-8") != "base64":
        return content.encode()
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise HubError(400, "The content of a file is not valid base64") from None
