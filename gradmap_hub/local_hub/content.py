"""Responses with file content: all of it, a range, or (HEAD) headers only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from .errors import HubError
from .gitids import Entry
from .objects import read_chunks

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")  # more digits are beyond any file


@dataclass(frozen=True)
class Span:
    """The byte range to send; ``end`` is exclusive."""

    start: int
    end: int


def requested_span(header: str | None, size: int) -> Span | None:
    """The range in a ``Range`` header; None to send the whole file.

    Raises:
        HubError: 416, the range lies outside the file.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or not (found[1] or found[2]):
        return None  # HTTP allows a server to ignore multiple ranges and other units
    if found[1]:
        start = int(found[1])
        end = min(int(found[2]) + 1, size) if found[2] else size
    else:
        start, end = max(size - int(found[2]), 0), size
    if start >= end:
        raise HubError(416, "The requested range is not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Span(start, end)


def file_response(
    http: HttpRequest, path: str, entry: Entry, file: Path, commit: str, attachment: bool = True
) -> Response:
    """The content of a file with the headers that huggingface_hub needs."""
    headers = {"X-Repo-Commit": commit}
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return stored_response(http, path.rpartition("/")[2], entry, file, attachment=attachment, extra=headers)


def stored_response(
    http: HttpRequest,
    name: str,
    entry: Entry,
    file: Path,
    *,
    attachment: bool = True,
    extra: Mapping[str, str] | None = None,
) -> Response:
    """The content of a file, or the requested range of it.

    ``attachment`` makes browsers save a text file instead of showing it; ``extra`` are further headers.

    Raises:
        HubError: 416, the range lies outside the file.
    """
    headers = {
        "ETag": f'"{entry.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8",
        # Repository content must never run as a page of this origin.
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        **(extra or {}),
    }
    if attachment or entry.sha256:
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name)}"
    if http.method == "HEAD":
        # The client expects the length of the whole file, so the range is ignored.
        return Response(headers={**headers, "Content-Length": str(entry.size)})
    span = requested_span(http.headers.get("range"), entry.size)
    status = 200
    if span is None:
        span = Span(0, entry.size)
    else:
        status = 206
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{entry.size}"
    headers["Content-Length"] = str(span.end - span.start)
    return StreamingResponse(read_chunks(file, span.start, span.end - span.start), status, headers)
