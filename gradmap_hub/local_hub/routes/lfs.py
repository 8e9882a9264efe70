"""LFS uploads: the batch API, the content (whole or multipart) and the verification."""

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
#: The lifetime of an upload URL, and of a multipart upload that receives no parts.
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
    # Anybody who may open a pull request may upload; objects are not visible before a commit.
    call.contributor(key)
    payload = call.json()
    if payload.get("operation") != "upload":
        raise HubError(400, "Only the upload operation is supported; download files from /resolve/")
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
            row["error"] = {"code": 422, "message": "The oid is not a SHA-256, or the size does not match it"}
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
    # The client sends no token here.
    key, oid = _signed(call, "complete")
    payload = call.json()
    if payload.get("oid") != oid:
        raise HubError(400, "The oid does not match the upload")
    etags: list[str] = []
    for number, part in enumerate(objects_in(payload, "parts"), 1):
        etag = part.get("etag")
        if part.get("partNumber") != number or not isinstance(etag, str):
            raise HubError(400, "parts need an etag and a partNumber, numbered from 1 in order")
        etags.append(etag.strip('"'))
    call.hub.store.state(key)
    objects, upload = call.hub.store.objects(key), _upload(call)
    # A client that lost the first response repeats the request.
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
    """The upload action of a multipart upload."""
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
    """The repository and oid of a signed URL.

    Raises:
        HubError: 403, the signature is invalid for this purpose or has expired.
    """
    key, oid = call.key(), call.param("oid")
    if not is_sha256(oid) or not call.hub.signer.allows(purpose, key, oid, call.http.query_params):
        raise HubError(403, "The upload URL is invalid or has expired")
    return key, oid


def _upload(call: Call) -> MultipartUpload:
    query = call.http.query_params
    plan = Plan(int(query["size"]), int(query["chunk"]))
    return MultipartUpload(call.hub.store.temporary, query["upload"], plan)


class _Writer(Protocol):
    def write(self, chunk: bytes) -> None: ...


async def _receive(call: Call, writer: _Writer) -> None:
    # Hash and write in a worker thread, in chunks large enough to amortise the switch.
    pending = bytearray()
    async for chunk in call.http.stream():
        pending += chunk
        if len(pending) >= CHUNK:
            await run_in_threadpool(writer.write, bytes(pending))
            pending.clear()
    await run_in_threadpool(writer.write, bytes(pending))
