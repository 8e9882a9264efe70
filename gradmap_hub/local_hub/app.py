"""The hub as an ASGI application: routes, error responses and middleware."""

from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .context import Hub, refusal
from .errors import HubError, RepoNotFound
from .gate import PortGate
from .names import PLURALS
from .requestlog import LogMiddleware, RequestLog
from .routes import accounts, collections, discussions, files, lfs, pages, repos, spaces, static, uploads, xet
from .wire import Wire

#: API path segments after the repository id that take a revision.
_VERBS = frozenset({"revision", "tree", "paths-info", "commits", "commit", "preupload", "branch", "tag"})

_LOOPBACK_ORIGIN = r"http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?"
_EXPOSED = ("ETag", "Link", "Accept-Ranges", "Content-Range", "X-Repo-Commit", "X-Error-Code", "X-Error-Message",
            "X-Linked-Size", "X-Linked-Etag")  # fmt: skip
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")


def build_app(hub: Hub, log: RequestLog, host: str | None) -> Starlette:
    """Build the application.

    Args:
        hub: the hub that the routes serve.
        log: records every request.
        host: the loopback address the hub listens on. Requests with another ``Host`` header are refused, which
            protects against DNS rebinding. None allows any host name.
    """
    modules = (accounts, repos, uploads, lfs, xet, spaces, collections, discussions, static, files, pages)
    routes = [route for module in modules for route in module.routes(hub)]
    # Ids without an owner ("gpt2") exist only on the real Hub.
    missing = ["/api/{kind}/{name}", "/api/{kind}/{name}/{rest:path}", "/{name}/resolve/{file:path}"]
    routes += [Route(address, _no_such_repo) for address in missing]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Wire),
            Middleware(LogMiddleware, log=log),
            # Pages of static Spaces fetch models, as from the Hub; pages of other sites have no business here.
            Middleware(CORSMiddleware, allow_origin_regex=_LOOPBACK_ORIGIN, expose_headers=_EXPOSED),
            Middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK_NAMES, host] if host else ["*"]),
            Middleware(SegmentedPath),
            Middleware(PortGate, cdn_port=hub.cdn_port),
        ],
        exception_handlers={HubError: _refused, HTTPException: _http_error},
    )


class SegmentedPath:
    """Unquotes the path segment by segment, so that a revision may contain a slash.

    The client sends the revision ``refs/pr/1`` as ``refs%2Fpr%2F1``. Unquoting the whole path would split it into
    three segments. The slash stays quoted until :meth:`Call.param` reads the segment.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            segments = scope["raw_path"].decode("ascii", "replace").split("/")
            # "%252F" also unquotes to "%2F" and would be read as a slash; no valid name contains "%2F".
            path = "/".join(unquote(segment).replace("/", "%2F") for segment in segments)
            scope = {**scope, "path": path}
        await self.app(scope, receive, send)


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return refusal(error)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "Sorry, we can't find the page you are looking for." if error.status_code == 404 else error.detail
    headers = {"X-Error-Message": message, **(error.headers or {})}
    return JSONResponse({"error": message}, status_code=error.status_code, headers=headers)


async def _no_such_repo(request: HttpRequest) -> Response:
    verb = request.path_params.get("rest", "").partition("/")[0]
    if request.path_params.get("kind", "models") in PLURALS.values() and verb in _VERBS | {""}:
        raise RepoNotFound
    raise HTTPException(404)
