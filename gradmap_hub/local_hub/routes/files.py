"""Downloading files."""

from starlette.responses import Response
from starlette.routing import Route

from ..content import file_response
from ..context import Call, Hub, endpoint
from ..errors import EntryNotFound
from ..names import PREFIXES


def routes(hub: Hub) -> list[Route]:
    return [
        Route(
            f"/{prefix}{{namespace}}/{{name}}/resolve/{{revision}}/{{path:path}}",
            endpoint(hub, resolve, repo_type),
        )
        # "datasets/..." must be tried before a model's owner of that (reserved) name.
        for repo_type, prefix in sorted(PREFIXES.items(), key=lambda item: item[1], reverse=True)
    ]


def resolve(call: Call) -> Response:
    key = call.key()
    path = call.path()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    call.readable(key, path)
    entry = call.hub.store.files(key, oid).get(path)
    if entry is None:
        raise EntryNotFound(commit=oid)
    return file_response(call.http, path, entry, call.hub.store.objects(key).file(entry), oid)
