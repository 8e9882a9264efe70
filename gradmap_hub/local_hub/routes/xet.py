"""Xet uploads: the write token and the storage.

The storage has its own tokens, each valid for one repository, and refuses tokens of the Hub. Optional endpoints
(deduplication queries, other transfer modes, telemetry) are not implemented; the client works without them.
"""

import base64
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..context import Call, Hub, answer
from ..errors import HubError, Unauthorized
from ..names import PLURALS, RepoKey, is_sha256, parse_repo_id
from ..objects import make_folder, open_private
from ..routing import RouteMaker
from ..xet import XORB_LIMIT, BadXet, read_pieces, read_shard

#: The path of the storage. A client remembers per URL what it has uploaded, so the path contains the id of the hub:
#: another hub on the same port must not look like the same storage.
STORAGE = "/xet/{hub}"
_TOKEN_SECONDS = 3600
#: Unlike for LFS, the signature covers a repository, not an object.
_ANY_OBJECT = ""


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, plural in PLURALS.items():
        make = RouteMaker(hub, repo_type)
        address = f"/api/{plural}/{{namespace}}/{{name}}/xet-write-token/{{revision}}"
        found.append(make.route("xet-token", address, token))
    make = RouteMaker(hub)
    return [
        *found,
        make.storage_streaming_route("xet-xorb", STORAGE + "/v1/xorbs/default/{hash}", take_xorb, "POST"),
        make.storage_route("xet-shard", STORAGE + "/v1/shards", take_shard, "POST"),
    ]


def token(call: Call) -> Response:
    if not call.hub.xet:
        raise HTTPException(404)
    key = call.key()
    call.contributor(key)
    query = call.hub.signer.sign("xet", key, _ANY_OBJECT, _TOKEN_SECONDS)
    text = base64.urlsafe_b64encode(f"{key.type} {key.id} {query}".encode()).decode()
    url, expires = call.base_url + STORAGE.format(hub=call.hub.signer.name), int(time.time()) + _TOKEN_SECONDS
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": text, "X-Xet-Token-Expiration": str(expires)}
    return answer({"casUrl": url, "accessToken": text, "exp": expires}, headers)


async def take_xorb(call: Call) -> Response:
    await run_in_threadpool(_repository, call)
    name = call.param("hash")
    if not is_sha256(name):
        raise BadXet("Invalid xorb hash")
    store, received = call.hub.store, 0
    target = store.xorb(name)
    draft = store.temporary / os.urandom(16).hex()
    try:
        with open_private(draft) as file:
            async for chunk in call.http.stream():
                received += len(chunk)
                if received > XORB_LIMIT:
                    raise HubError(413, "The xorb is too large")
                file.write(chunk)

        def keep() -> None:
            for _ in read_pieces(draft):  # verify before it can replace a valid xorb
                pass
            make_folder(target.parent)
            os.replace(draft, target)

        await run_in_threadpool(keep)
    finally:
        draft.unlink(missing_ok=True)
    return JSONResponse({"was_inserted": True})


def take_shard(call: Call) -> Response:
    key = _repository(call)
    store = call.hub.store
    store.state(key)
    for file in read_shard(call.body):
        if store.objects(key).lfs_size(file.sha256) is None:
            chunks = (
                piece
                for segment in file.segments
                for piece in read_pieces(_known(call, segment.xorb), segment.start, segment.end)
            )
            store.objects(key).put_lfs(chunks, file.sha256, file.size)
    return JSONResponse({"result": 1})


def _known(call: Call, xorb: str) -> Path:
    path = call.hub.store.xorb(xorb)
    if not path.is_file():
        raise BadXet(f"Xorb {xorb} not found")
    return path


def _repository(call: Call) -> RepoKey:
    """The repository that the token of this call is valid for.

    Raises:
        HTTPException: 404, the storage belongs to another hub.
        Unauthorized: the token is invalid or has expired.
    """
    scheme, _, text = call.http.headers.get("authorization", "").partition(" ")
    if call.param("hub") != call.hub.signer.name:
        raise HTTPException(404)
    with suppress(ValueError, KeyError, HubError):
        repo_type, repo_id, query = base64.urlsafe_b64decode(text.strip()).decode().split(" ")
        key = parse_repo_id(repo_id, repo_type)
        fields = {name: values[0] for name, values in parse_qs(query).items()}
        if scheme.lower() == "bearer" and call.hub.signer.allows("xet", key, _ANY_OBJECT, fields):
            return key
    raise Unauthorized("This token is not valid for the storage, or it has expired")
