"""The client's HTTP session while we use it: no request hangs for ever, every request is made once, and an upload is
counted.

huggingface_hub repeats some requests by itself, which ones depends on its version: an LFS upload without asking whether
the bytes have arrived after all, and from 1.x on nearly everything, for as long as the Hub's `Retry-After` says. Here a
failed request fails at once, so that whoever tries again (`hub.attempt`) knows of it, asks the Hub first what it has,
and waits within bounds. Only the parts of a large file are left to the client: it repeats the one part, and we would
have to begin again with the first.

The client is built on requests, httpx or httpx2, by its version. None of them is imported: their sessions are called
alike, and their exceptions have one base class each, which the client's own exceptions lead to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status  # pyright: ignore[reportPrivateImportUsage]

# What every exception of the client's HTTP library is: requests' RequestException, httpx' HTTPError.
HttpFailure: type[Exception] = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"][-1]
# Failures of a moment. 501 and 505 are not.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
# To connect, and between two pieces of an answer. The client itself waits for ever.
TIMEOUTS = (30.0, 300.0)
# A request that cannot even be made, by the names that httpx has for it; those of requests are ValueErrors.
_NEVER_MADE = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")
_BATCH = "/info/lfs/objects/batch"


class RequestFailed(OSError):
    """A request without an answer. Not one of the exceptions on which the client itself tries again. `reason`: what
    the HTTP library calls it; `passing`: whether it may go better at another time."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"The connection to the Hub failed ({type(error).__name__})")
        self.reason = type(error).__name__
        self.passing = may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Whether a failure without an answer, or with one that is no JSON or was cut short, may pass."""
    if isinstance(error, RequestFailed):
        return error.passing
    if isinstance(error, JSONDecodeError):
        return True
    never_made = isinstance(error, ValueError) or type(error).__name__ in _NEVER_MADE
    return is_http(error) and not never_made


def is_http(error: BaseException) -> bool:
    """Whether a failure is one of talking to the Hub: over HTTP, or by xet, which raises Python's own exceptions."""
    return isinstance(error, (HttpFailure, RequestFailed, ConnectionError, TimeoutError))


@dataclass
class Watch:
    """What one upload did; `seconds` without the waits between tries. `told` is called with the bytes of every piece
    that leaves; by xet, with those that are done, of which fewer leave."""

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
        """Remember what the Hub said when it was asked whether it has the object."""
        if response.status_code >= 400:
            return
        self.asked = True
        try:
            answer = response.json()
            objects = answer.get("objects", [])
            self.in_parts = any("chunk_size" in _upload_header(entry) for entry in objects)
            self.stored_before = answer.get("transfer") != "xet" and all("actions" not in entry for entry in objects)
        except (ValueError, AttributeError, TypeError):
            return  # the client will say what is wrong with it


@contextmanager
def guarded(watch: Watch | None = None) -> Iterator[None]:
    """Within it, requests have timeouts and are made once; with a watch, uploads are counted."""
    session = get_session()
    plain = session.request
    plain_stream: Any = getattr(session, "stream", None)
    streams = callable(plain_stream)  # a method in httpx, a flag in requests
    # httpx writes without a limit of time where only two are given; requests knows no more than two.
    limits = TIMEOUTS if not streams else (*TIMEOUTS, TIMEOUTS[1], TIMEOUTS[0])

    def limited(options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("timeout")  # of httpx' get and post: an object that says "none was given"
        return options | {"timeout": given if isinstance(given, int | float | tuple) else limits}

    def request(method: str, url: str, *args: Any, **options: Any) -> Any:
        options = limited(options)
        if watch is not None and method.upper() == "PUT":
            return _put(plain, watch, method, url, args, options)
        response = _once(lambda: plain(method, url, *args, **options))
        if watch is not None and str(url).split("?")[0].endswith(_BATCH):
            watch.read_batch(response)
        return response

    @contextmanager
    def stream(method: str, url: str, *args: Any, **options: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            yield _once(lambda: stack.enter_context(plain_stream(method, url, *args, **limited(options))))

    # On this one object, and taken back: a session that somebody configured for the client stays what it was. In 0.x a
    # thread has its own, later all have one: only one thread of ours talks to a Hub at a time.
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
    """The answer; a failure that the client would repeat itself is raised as one that it does not."""
    try:
        response = call()
    except (RequestFailed, OfflineModeIsEnabled, HfHubHTTPError):
        raise
    except Exception as error:
        raise RequestFailed(error) from error
    if response.status_code in PASSING:
        hf_raise_for_status(response)
    return response


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
        if response.status_code == 429:  # for which the client may wait without bounds
            hf_raise_for_status(response)
        return response
    finally:
        watch.seconds += time.monotonic() - started


class _Counted:
    """A file that tells how much of it was read."""

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
