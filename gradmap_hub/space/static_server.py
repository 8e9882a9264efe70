"""Serves the static (in-browser) Space locally: the page shipped with this package, plus files read in place from the
model folder and its Space folder. Nothing is copied."""

from __future__ import annotations

import socket
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from gradmap_hub.comparison import COMPARE
from gradmap_hub.formats import graph_path, of_precision
from gradmap_hub.machine import is_loopback
from gradmap_hub.progress import Reporter
from gradmap_hub.space.browser import (
    HEADERS,
    INDEX,
    PRUNED_FOLDER,
    TOKENIZER,
    BrowserPage,
    browser_facts,
    page_files,
)
from gradmap_hub.space.vendor import LIBRARIES, VENDOR, fetch

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def local_files(space: Path, page: BrowserPage, libraries: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """What a browser Space with both models stored in it would contain: local files by their path in the Space, and the
    content of compare.json.

    Raises:
        SpaceImpossible: no precision fits into a browser.
        SourceError: compare.json is missing or invalid.
    """
    facts = browser_facts(space, page)
    files = {path.name: path for path in page_files()}
    files |= {f"{VENDOR}/{name}": libraries / name for name in LIBRARIES}
    files[TOKENIZER] = page.model_folder / TOKENIZER
    for entry in facts["precisions"]:
        original, name = entry["original"], entry["file"]
        if original["stored"] == "space":
            files[f"{original['path']}/{name}"] = space / original["path"] / name
        entry["pruned"] |= {"stored": "space", "path": PRUNED_FOLDER}
        files[f"{PRUNED_FOLDER}/{name}"] = page.model_folder / graph_path(of_precision(entry["name"]))
    return files, facts


def build_app(
    files: Mapping[str, Path],
    facts: Mapping[str, Any],
    host: str | None,
    custom_headers: Mapping[str, str] = HEADERS,
) -> Starlette:
    """A web app that serves `files` by path, and `facts` as compare.json, with the headers of a static Space. `host`:
    the loopback address that is served; None accepts any Host header."""
    headers = {**custom_headers, "cache-control": "no-cache"}

    def file(request: Request) -> Response:
        name = request.path_params["path"] or INDEX
        if name == COMPARE:
            return JSONResponse(dict(facts), headers=headers)
        if name not in files:
            return Response("Not found", 404, headers)
        return FileResponse(files[name], headers=headers, media_type=_TYPES.get(files[name].suffix))

    # Otherwise a page of another site could read the models by DNS rebinding.
    allowed = [*_LOOPBACK, host] if host else ["*"]
    return Starlette(
        routes=[Route("/{path:path}", file)], middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)]
    )


def serve_page(
    space: Path,
    page: BrowserPage,
    *,
    host: str,
    port: int,
    open_browser: bool,
    reporter: Reporter,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until SIGINT or SIGTERM. `ready` is called with the URL; by default it prints it on stdout.

    Raises:
        BrowserRuntimeMissing: see `vendor.fetch`.
        SpaceImpossible, SourceError: see `local_files`.
        OSError: the port is in use.
    """
    files, facts = local_files(space, page, fetch(reporter))
    loopback = is_loopback(host)
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listener.getsockname()[1]}"
    if not loopback:
        reporter.note("Other machines get neither threads nor WebGPU: browsers allow both only over https.")
    app = build_app(files, facts, host if loopback else None)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False, ws="none")
    server = uvicorn.Server(config)
    ready(url)
    if open_browser:
        webbrowser.open(url)
    try:
        server.run([listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped
        return
