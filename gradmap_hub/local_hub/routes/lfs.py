"""Uploading LFS objects: what to send where, the bytes (whole or in parts), and whether they arrived."""

from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..context import Call, Hub, answer, objects_in
from ..errors import HubError
from ..multipart import MultipartUpload, Plan, new_upload_id
from ..names import PLURALS, PREFIXES, RepoKey, is_sha256
from ..objects import CHUNK
from ..routing import RouteMaker

_LFS_JSON = "application/vnd.git-lfs+json"
#: For how long an upload address works, and an upload in parts is kept without any arriving.
_UPLOAD_SECONDS = 24 * 3600


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, prefix in PREFIXES.items():
        make = RouteMaker(hub, repo_type)
        api = f"/{prefix}{{namespace}}/{{name}}/info/lfs/objects"
        storage = f"/lfs/{PLURALS[repo_type]}/{{namespace}}/{{name}}/{{oid}}"
        found += [
            make.route("lfs-batch", f"{api}/batch", batch, "POST"),
            make.signed_streaming_route("lfs-put", storage, put, "PUT"),
            make.signed_streaming_route("lfs-part", f"{storage}/part", put_part, "PUT"),
            make.route("lfs-complete", f"{storage}/complete", complete, "POST"),
            make.route("lfs-verify", f"{api}/verify", verify, "POST"),
        ]
    return found


def batch(call: Call) -> Response:
    key = call.key()
    # Whoever may open a pull request may upload for it; nothing is visible before a commit.
    call.contributor(key)
    payload = call.json()
    if payload.get("operation") != "upload":
        raise HubError(400, "Only uploads are offered; files are downloaded from /resolve/")
    transfers = payload.get("transfers")
    in_parts = isinstance(transfers, list) and "multipart" in transfers
    by_xet = call.hub.xet and isinstance(transfers, list) and "xet" in transfers
    objects = call.hub.store.objects(key)
    transfer = "xet" if by_xet else "basic"
    rows: list[dict[str, Any]] = []
    for asked in objects_in(payload, "objects"):
        oid, size = asked.get("oid"), asked.get("size")
        if not isinstance(oid, str) or not isinstance(size, int):
            raise HubError(422, "objects need an oid and a size")
        row: dict[str, Any] = {"oid": oid, "size": size}
        stored = objects.lfs_size(oid) if is_sha256(oid) else None
        if not is_sha256(oid) or size < 0 or stored not in (None, size):
            row["error"] = {"code": 422, "message": "The oid is not a SHA-256, or the size does not fit it"}
        elif stored is None:
            if not by_xet and in_parts and size > call.hub.multipart_bytes:
                transfer = "multipart"
                upload = _upload_in_parts(call, key, oid, size)
            else:
                query = call.hub.signer.sign("upload", key, oid, _UPLOAD_SECONDS, size=size)
                upload = {"href": f"{_storage_url(call, key, oid)}?{query}"}
            verify_url = f"{call.base_url}/{key.address}.git/info/lfs/objects/verify"
            row["actions"] = {"upload": upload, "verify": {"href": verify_url}}
        rows.append(row)
    return JSONResponse({"transfer": transfer, "objects": rows, "hash_algo": "sha256"}, media_type=_LFS_JSON)


async def put(call: Call) -> Response:
    key, oid = _signed(call, "upload")
    await run_in_threadpool(call.hub.store.state, key)
    with call.hub.store.objects(key).lfs_writer(oid, int(call.http.query_params["size"])) as writer:
        await _receive(call, writer)
        await run_in_threadpool(writer.commit)
    return Response(headers={"ETag": f'"{oid}"'})


async def put_part(call: Call) -> Response:
    key, _ = _signed(call, "part")
    await run_in_threadpool(call.hub.store.state, key)
    with _upload(call).part_writer(int(call.http.query_params["part"])) as writer:
        await _receive(call, writer)
        etag = await run_in_threadpool(writer.commit)
    return Response(headers={"ETag": f'"{etag}"'})


def complete(call: Call) -> Response:
    # The client shows no token here, although it could.
    key, oid = _signed(call, "complete")
    payload = call.json()
    if payload.get("oid") != oid:
        raise HubError(400, "The oid is not that of the upload")
    etags: list[str] = []
    for number, part in enumerate(objects_in(payload, "parts"), 1):
        etag = part.get("etag")
        if part.get("partNumber") != number or not isinstance(etag, str):
            raise HubError(400, "parts must have a partNumber, from 1 on and in order, and an etag")
        etags.append(etag.strip('"'))
    call.hub.store.state(key)
    objects, upload = call.hub.store.objects(key), _upload(call)
    # A client that did not get the first answer asks again.
    if objects.lfs_size(oid) != upload.plan.size:
        upload.complete(etags, oid, objects.lfs_file(oid))
    return answer({"message": "OK"})


def verify(call: Call) -> Response:
    key = call.key()
    call.contributor(key)
    payload = call.json()
    oid = payload.get("oid")
    size = call.hub.store.objects(key).lfs_size(oid) if isinstance(oid, str) and is_sha256(oid) else None
    if size is None or size != payload.get("size"):
        raise HubError(404, "No object with this oid and size was uploaded")
    return answer({"message": "OK"})


def _storage_url(call: Call, key: RepoKey, oid: str) -> str:
    return f"{call.base_url}/lfs/{PLURALS[key.type]}/{key.id}/{oid}"


def _upload_in_parts(call: Call, key: RepoKey, oid: str, size: int) -> dict[str, Any]:
    """The upload action of an object that is sent in parts."""
    plan = Plan.for_size(size, call.hub.multipart_bytes)
    upload_id = new_upload_id(call.hub.store.temporary, older_than=_UPLOAD_SECONDS)
    url = _storage_url(call, key, oid)
    sign = call.hub.signer.sign

    def part_url(number: int) -> str:
        query = sign("part", key, oid, _UPLOAD_SECONDS, upload=upload_id, size=size, chunk=plan.chunk, part=number)
        return f"{url}/part?{query}"

    header = {"chunk_size": str(plan.chunk)}
    header |= {f"{number:05}": part_url(number) for number in range(1, plan.count + 1)}
    query = sign("complete", key, oid, _UPLOAD_SECONDS, upload=upload_id, size=size, chunk=plan.chunk)
    return {"href": f"{url}/complete?{query}", "header": header}


def _signed(call: Call, purpose: str) -> tuple[RepoKey, str]:
    """The repository and the object of a signed address.

    Raises:
        HubError: 403, it is not signed for this, or the signature has expired.
    """
    key, oid = call.key(), call.param("oid")
    if not is_sha256(oid) or not call.hub.signer.allows(purpose, key, oid, call.http.query_params):
        raise HubError(403, "The upload address is not valid, or no longer")
    return key, oid


def _upload(call: Call) -> MultipartUpload:
    query = call.http.query_params
    plan = Plan(int(query["size"]), int(query["chunk"]))
    return MultipartUpload(call.hub.store.temporary, query["upload"], plan)


class _Writer(Protocol):
    def write(self, chunk: bytes) -> None: ...


async def _receive(call: Call, writer: _Writer) -> None:
    # Hashing and writing go to a worker thread in pieces large enough to be worth the trip.
    pending = bytearray()
    async for chunk in call.http.stream():
        pending += chunk
        if len(pending) >= CHUNK:
            await run_in_threadpool(writer.write, bytes(pending))
            pending.clear()
    await run_in_threadpool(writer.write, bytes(pending))
