"""File downloads: /resolve/ on the main port, LFS content on the CDN port."""

from urllib.parse import quote

from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..content import file_response, stored_response
from ..context import Call, Hub
from ..errors import EntryNotFound, HubError
from ..gate import CDN_PREFIX
from ..gitids import Entry
from ..names import PLURALS, PREFIXES, RepoKey, is_sha256
from ..routing import RouteMaker


def routes(hub: Hub) -> list[Route]:
    found: list[Route] = []
    for repo_type, prefix in PREFIXES.items():
        make = RouteMaker(hub, repo_type)
        address = f"/{prefix}{{namespace}}/{{name}}/resolve/{{revision}}/{{path:path}}"
        cdn = f"{CDN_PREFIX}{PLURALS[repo_type]}/{{namespace}}/{{name}}/{{oid}}"
        found += [
            make.route("resolve-head", address, resolve, "HEAD"),
            make.route("resolve-get", address, resolve),
            make.signed_route("cdn-get", cdn, from_cdn),
        ]
    return found


def resolve(call: Call) -> Response:
    key = call.key()
    path = call.path()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    entry = call.hub.store.files(key, oid).get(path)
    call.readable(key, path, entry)
    if entry is None:
        raise EntryNotFound(commit=oid)
    if entry.sha256 is not None and call.hub.cdn_port is not None:
        return _redirect(call, key, path, entry, entry.sha256, oid)
    return file_response(call.http, path, entry, call.hub.store.objects(key).file(entry), oid)


def from_cdn(call: Call) -> Response:
    """The content of an LFS file, for any client with a URL signed by /resolve/."""
    key, oid, query = call.key(), call.param("oid"), call.http.query_params
    if not is_sha256(oid) or not call.hub.signer.allows("download", key, oid, query):
        raise HubError(403, "The download URL is invalid or has expired")
    objects = call.hub.store.objects(key)
    size = objects.lfs_size(oid)
    if size is None:
        raise HubError(404, "Object not found")
    entry = Entry(oid, size, oid)
    # After a redirect to another host, a browser sends "Origin: null". The URL is signed, so any origin may read it.
    extra = {"Access-Control-Allow-Origin": "*"}
    return stored_response(call.http, query.get("filename", oid), entry, objects.file(entry), extra=extra)


def _redirect(call: Call, key: RepoKey, path: str, entry: Entry, sha256: str, commit: str) -> Response:
    name = path.rpartition("/")[2]
    query = call.hub.signer.sign("download", key, sha256, call.hub.cdn_seconds, filename=name)
    location = f"{call.cdn_url}{CDN_PREFIX}{PLURALS[key.type]}/{quote(key.id)}/{sha256}?{query}"
    headers = {
        "Location": location,
        "X-Repo-Commit": commit,
        "X-Linked-Etag": f'"{sha256}"',
        "X-Linked-Size": str(entry.size),
        "Accept-Ranges": "bytes",
        # The URL grants this caller temporary access.
        "Cache-Control": "private, no-store",
    }
    return PlainTextResponse(f"Found. Redirecting to {location}", 302, headers)
