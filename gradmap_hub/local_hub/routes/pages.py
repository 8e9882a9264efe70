"""Plain HTML pages for browsers. No scripts, no forms, everything escaped.

The permissions of the API apply. A browser sends no token, so it sees only what is public: other users of this machine
can connect to a loopback address too.
"""

import html
from collections.abc import Iterable
from urllib.parse import quote

from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..content import file_response
from ..context import Call, Hub
from ..errors import EntryNotFound, HubError
from ..gitids import Entry
from ..names import PREFIXES, RepoKey, RepoType
from ..routing import RouteMaker
from ..store import RepoState

_README_LIMIT = 512 * 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       overflow-wrap: anywhere; }
pre { white-space: pre-wrap; border: 1px solid #8886; border-radius: 6px; padding: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #8884; }
td.size { text-align: right; white-space: nowrap; }
.note { color: GrayText; }
"""
_TITLES: dict[RepoType, str] = {"model": "Models", "space": "Spaces", "dataset": "Datasets"}


def routes(hub: Hub) -> list[Route]:
    found = [RouteMaker(hub).route("page", "/", index)]
    for repo_type, prefix in PREFIXES.items():
        make = RouteMaker(hub, repo_type)
        address = f"/{prefix}{{namespace}}/{{name}}"
        found += [
            make.route("page", address, repo_page),
            make.route("page", f"{address}/tree/{{revision}}", repo_page),
            make.route("page", f"{address}/commit/{{revision}}", repo_page),
            make.route("page", f"{address}/discussions/{{pull}}", repo_page),
            make.route("page", f"{address}/blob/{{revision}}/{{path:path}}", file_page),
        ]
    return found


def index(call: Call) -> Response:
    parts = ["<h1>Local hub</h1><p class=note>A local Hugging Face Hub for rehearsals.</p>"]
    for repo_type, title in _TITLES.items():
        rows: list[str] = []
        for key in call.hub.store.keys(repo_type):
            try:
                state = call.visible(key)
            except HubError:  # not visible, or deleted since it was listed
                continue
            note = ", ".join(_labels(state))
            rows.append(f"<li><a href='/{quote(key.address)}'>{html.escape(key.id)}</a> <span class=note>{note}</span>")
        parts.append(f"<h2>{title}</h2>" + (f"<ul>{''.join(rows)}</ul>" if rows else "<p class=note>None yet.</p>"))
    return _page("Local hub", parts)


def repo_page(call: Call) -> Response:
    key = call.key()
    state = call.visible(key)
    params = call.http.path_params
    revision = (
        f"refs/pr/{params['pull']}" if "pull" in params else call.param("revision") if "revision" in params else "main"
    )
    oid = call.hub.store.resolve(key, revision)
    commit = call.hub.store.commit_info(key, oid)
    files = call.hub.store.files(key, oid)
    parts = [
        f"<p><a href='/'>Local hub</a></p><h1>{html.escape(key.id)}</h1>",
        f"<p class=note>{', '.join([key.type, *_labels(state)])}</p>",
        f"<p>{html.escape(revision)} at <code>{oid}</code>: {html.escape(commit.title)}"
        f" <span class=note>({html.escape(commit.author)}, {commit.date})</span></p>",
        "<h2>Files</h2><table><tr><th>Path<th>Size</tr>",
        *(_file_row(key, oid, path, entry) for path, entry in files.items()),
        "</table>",
    ]
    readme = files.get("README.md")
    if readme is not None and readme.sha256 is None:
        text = call.hub.store.objects(key).read(readme, _README_LIMIT).decode("utf-8", "replace")
        parts.append(f"<h2>README.md</h2><pre>{html.escape(text)}</pre>")
    return _page(key.id, parts)


def file_page(call: Call) -> Response:
    """The content of a file for a browser."""
    key = call.key()
    path = call.path()
    call.visible(key)
    oid = call.hub.store.resolve(key, call.param("revision"))
    entry = call.hub.store.files(key, oid).get(path)
    call.readable(key, path, entry)
    if entry is None:
        raise EntryNotFound(commit=oid)
    return file_response(call.http, path, entry, call.hub.store.objects(key).file(entry), oid, attachment=False)


def _labels(state: RepoState) -> list[str]:
    labels = ["private"] if state.private else []
    return labels + ([f"gated ({state.gated})"] if state.gated else [])


def _file_row(key: RepoKey, oid: str, path: str, entry: Entry) -> str:
    link = f"/{quote(key.address)}/blob/{oid}/{quote(path)}"
    lfs = " <span class=note>LFS</span>" if entry.sha256 else ""
    return f"<tr><td><a href='{link}'>{html.escape(path)}</a>{lfs}<td class=size>{entry.size:,} bytes</tr>"


def _page(title: str, parts: Iterable[str]) -> Response:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    view = "<meta name=viewport content='width=device-width, initial-scale=1'>"
    return HTMLResponse(f"{head}{view}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>", headers=_HEADERS)
