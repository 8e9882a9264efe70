"""Wraps the HTTP session of the client: requests have timeouts and are made once, and uploads are counted.

huggingface_hub retries some requests by itself, depending on its version: an LFS upload without asking whether the
bytes arrived, and from 1.x on nearly everything, for as long as `Retry-After` says. Here a failed request fails at
once, so that `Hub.attempt` decides about the retry, can ask the Hub first what it has, and limits the wait. Only the
parts of a large file are left to the client, which retries one part, while we would start again with the first.

The client uses requests, httpx or httpx2, depending on its version. None of them is imported: their sessions have the
same interface, and the base class of their exceptions is found through the client's own exceptions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status  # pyright: ignore[reportPrivateImportUsage]

from gradmap_hub.errors import HubError
from gradmap_hub.units import reason_of

# Base class of the exceptions of the client's HTTP library: requests.RequestException or httpx.HTTPError.
HttpFailure: type[Exception] = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"][-1]
# Status codes of transient failures; 501 and 505 are permanent.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
# Seconds to connect, and between two pieces of an answer. The client has no limit of its own.
TIMEOUTS = (30.0, 300.0)
# Names of the httpx exceptions for invalid requests; those of requests are ValueErrors.
_NEVER_MADE = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")
_BATCH = "/info/lfs/objects/batch"


# Valid values of the headers that the client (0.36, 2.4) uses unchanged as file names in its cache: a commit id, and
# the git or LFS hash of the file, or the ETag of a CDN.
_PLAIN_NAME = re.compile(r'(?:W/)?"?[0-9A-Za-z][0-9A-Za-z_.-]{0,199}"?')


class RequestFailed(OSError):
    """A request without an answer; a type that the client does not retry. `reason`: the exception of the HTTP library;
    `passing`: whether the failure is transient."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"The connection to the Hub failed ({type(error).__name__})")
        self.reason = type(error).__name__
        self.passing = may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Whether a failure without an answer, or with a truncated one or one that is not JSON, is transient."""
    if isinstance(error, RequestFailed):
        return error.passing
    if isinstance(error, JSONDecodeError):
        return True
    never_made = isinstance(error, ValueError) or type(error).__name__ in _NEVER_MADE
    return is_http(error) and not never_made


def is_http(error: BaseException) -> bool:
    """Whether the communication with the Hub failed, over HTTP or xet, which raises built-in exceptions."""
    return isinstance(error, (HttpFailure, RequestFailed, ConnectionError, TimeoutError))


@dataclass
class Watch:
    """Counts one upload.

    `told` is called with the bytes of every piece sent; with xet, with the bytes processed, of which fewer are sent.
    `sent`: bytes; `seconds`: without the waits between attempts; `asked`: whether the Hub was asked about the file;
    `stored_before`: whether the Hub had it; `in_parts`: whether it is sent in several parts; `by_xet`: whether xet
    sends it.
    """

    told: Callable[[int], None]
    sent: int = field(default=0)
    seconds: float = field(default=0.0)
    asked: bool = field(default=False)
    stored_before: bool = field(default=False)
    in_parts: bool = field(default=False)
    by_xet: bool = field(default=False)

    def count(self, size: int) -> None:
        self.sent += size
        self.told(size)

    def read_batch(self, response: Any) -> None:
        """Read from an LFS batch answer whether the Hub has the object."""
        if response.status_code >= 400:
            return
        self.asked = True
        try:
            answer = response.json()
            objects = answer.get("objects", [])
            self.in_parts = any("chunk_size" in _upload_header(entry) for entry in objects)
            self.stored_before = answer.get("transfer") != "xet" and all("actions" not in entry for entry in objects)
        except (ValueError, AttributeError, TypeError):
            return  # the client raises its own error


@contextmanager
def guarded(watch: Watch | None = None) -> Iterator[None]:
    """In this context, the client's requests have timeouts and are made once; `watch` counts uploads."""
    session = get_session()
    plain = session.request
    plain_stream: Any = getattr(session, "stream", None)
    streams = callable(plain_stream)  # a method in httpx, a flag in requests
    # httpx has no write timeout if only two values are given; requests accepts two only.
    limits = TIMEOUTS if not streams else (*TIMEOUTS, TIMEOUTS[1], TIMEOUTS[0])

    def limited(options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("timeout")  # get and post of httpx pass a sentinel object for "not given"
        return options | {"timeout": given if isinstance(given, int | float | tuple) else limits}

    def request(method: str, url: str, *args: Any, **options: Any) -> Any:
        options = limited(options)
        if watch is not None and method.upper() == "PUT":
            return _put(plain, watch, method, url, args, options)
        response = _once(lambda: plain(method, url, *args, **options))
        if method.upper() == "HEAD":
            _check_names(response)
        if watch is not None and str(url).split("?")[0].endswith(_BATCH):
            watch.read_batch(response)
        return response

    @contextmanager
    def stream(method: str, url: str, *args: Any, **options: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            yield _once(lambda: stack.enter_context(plain_stream(method, url, *args, **limited(options))))

    # Patch this session object only, and restore it: it may be configured by the user. In 0.x each thread has its own
    # session, later all share one; only one of our threads talks to a Hub at a time.
    ours: dict[str, Any] = {"request": request} | ({"stream": stream} if streams else {})
    before = {name: session.__dict__[name] for name in ours if name in session.__dict__}
    session.__dict__.update(ours)
    try:
        yield
    finally:
        for name in ours:
            session.__dict__.pop(name, None)
        session.__dict__.update(before)


def _once(call: Callable[[], Any]) -> Any:
    """The answer; failures that the client would retry are raised as types that it does not retry."""
    try:
        response = call()
    except (RequestFailed, OfflineModeIsEnabled, HfHubHTTPError):
        raise
    except Exception as error:
        raise RequestFailed(error) from error
    if response.status_code in PASSING:
        hf_raise_for_status(response)
    return response


def _check_names(response: Any) -> None:
    """Check the headers that the client uses as file names in its cache.

    Raises:
        HubError: one is not a plain name.
    """
    headers = response.headers
    named = {"X-Repo-Commit": headers.get("X-Repo-Commit")}
    # The answers of errors, and of a repository's new name, which the client follows, have hashes of their own.
    if response.status_code < 300 or (response.status_code < 400 and urlsplit(headers.get("Location", "")).netloc):
        named["ETag"] = headers.get("X-Linked-Etag") or headers.get("ETag")
    for name, value in named.items():
        if value is not None and not _PLAIN_NAME.fullmatch(value):
            raise HubError(f"The Hub sent a file with the {name} {reason_of(value, 80)!r}, which is not a hash.")


def _upload_header(entry: dict[str, Any]) -> dict[str, Any]:
    return entry.get("actions", {}).get("upload", {}).get("header") or {}


def _put(
    plain: Callable[..., Any], watch: Watch, method: str, url: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    if hasattr(options.get("data"), "read"):
        options["data"] = _Counted(options["data"], watch.count)
    started = time.monotonic()
    try:
        if not watch.in_parts:
            return _once(lambda: plain(method, url, *args, **options))
        response = plain(method, url, *args, **options)
        if response.status_code == 429:  # the client may wait for it without a limit
            hf_raise_for_status(response)
        return response
    finally:
        watch.seconds += time.monotonic() - started


class _Counted:
    """A file that reports how much of it is read."""

    def __init__(self, stream: Any, told: Callable[[int], None]) -> None:
        self._stream = stream
        self._told = told
        start = stream.tell()
        self._size = stream.seek(0, 2)
        stream.seek(start)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(1 << 16):
            yield piece

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._told(len(piece))
        return piece

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)
