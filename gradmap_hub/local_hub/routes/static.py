"""Static Spaces as sites: on the CDN port, so that a page of a repository has another origin than the API."""

import mimetypes

from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ..cards import CUSTOM_HEADERS
from ..content import stored_response
from ..context import Call, Hub
from ..errors import EntryNotFound, RepoNotFound
from ..gate import STATIC_PREFIX
from ..metadata import read_card
from ..routing import RouteMaker

# The table of the system (mimetypes) may have other types for these, or none.
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".css": "text/css"}


def routes(hub: Hub) -> list[Route]:
    make = RouteMaker(hub, "space")
    address = f"{STATIC_PREFIX}{{namespace}}/{{name}}"
    return [
        make.signed_route("static", address, with_slash),
        make.signed_route("static", f"{address}/", site),
        make.signed_route("static", f"{address}/{{path:path}}", site),
    ]


def with_slash(call: Call) -> Response:
    """Redirect to the URL with a trailing slash: links in a page are relative to its folder."""
    return RedirectResponse(f"{call.http.url.path}/", 307)


def site(call: Call) -> Response:
    """A file of a public static Space at its head, with the custom headers of its card.

    Raises:
        RepoNotFound: the Space is not visible, or not static.
        EntryNotFound: the Space has no such file.
    """
    key = call.key()
    state = call.visible(key)
    oid = call.hub.store.resolve(key, "main")
    files = call.hub.store.files(key, oid)
    objects = call.hub.store.objects(key)
    card = read_card(objects, files)
    if state.space is None or card.get("sdk", state.space.sdk) != "static":
        raise RepoNotFound
    path = call.path() if call.http.path_params.get("path") else str(card.get("app_file") or "index.html")
    entry = files.get(path)
    if entry is None:
        raise EntryNotFound(commit=oid)
    suffix = f".{path.rpartition('.')[2]}"
    kind = _TYPES.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
    wanted = card.get("custom_headers")
    headers = {name: str(value) for name, value in wanted.items()} if isinstance(wanted, dict) else {}
    headers = {name: value for name, value in headers.items() if name.lower() in CUSTOM_HEADERS}
    answer = stored_response(call.http, path.rpartition("/")[2], entry, objects.file(entry), attachment=False)
    for name in ("Content-Security-Policy", "Content-Disposition"):
        if name in answer.headers:
            del answer.headers[name]
    answer.headers.update({"Content-Type": kind, "Cache-Control": "no-cache", **headers})
    return answer
