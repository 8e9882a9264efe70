"""The client's HTTP session while we use it: no request hangs for ever, and an upload is sent once, counted.

huggingface_hub repeats an LFS upload by itself, without asking whether the bytes have arrived after all. Here a failed
one fails at once, so that whoever tries again asks the Hub first what it has. Only the parts of a large file are left
to the client: it repeats the one part, and we would have to begin again with the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils import get_session, hf_raise_for_status  # pyright: ignore[reportPrivateImportUsage]
from requests import ConnectionError, RequestException, Response, Timeout
from requests.exceptions import ChunkedEncodingError
from requests.utils import super_len

# To connect, and between two pieces of an answer. The client itself waits for ever.
TIMEOUTS = (30.0, 300.0)
_BATCH = "/info/lfs/objects/batch"


class UploadBroken(RequestException):
    """A PUT whose answer never came. Not one of the exceptions on which the client sends again."""


@dataclass
class Watch:
    """What one upload did; `seconds` without the waits between tries. `told` is called with the bytes of every piece
    that leaves."""

    told: Callable[[int], None]
    sent: int = field(default=0)
    seconds: float = field(default=0.0)
    asked: bool = field(default=False)
    stored_before: bool = field(default=False)
    in_parts: bool = field(default=False)

    def count(self, size: int) -> None:
        self.sent += size
        self.told(size)

    def read_batch(self, response: Response) -> None:
        """Remember what the Hub said when it was asked whether it has the object."""
        if not response.ok:
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
    """Within it, requests of this thread have timeouts; with a watch, uploads are sent once and counted."""
    session = get_session()
    before = session.__dict__.get("request")
    plain = session.request

    def request(method: str, url: str, *args: Any, **options: Any) -> Response:
        options["timeout"] = options.get("timeout") or TIMEOUTS
        if watch is not None and method.upper() == "PUT":
            return _put(plain, watch, method, url, args, options)
        response = plain(method, url, *args, **options)
        if watch is not None and url.split("?")[0].endswith(_BATCH):
            watch.read_batch(response)
        return response

    # On this one object, and taken back: a session that somebody configured for the client stays what it was.
    session.__dict__["request"] = request
    try:
        yield
    finally:
        if before is None:
            session.__dict__.pop("request", None)
        else:
            session.__dict__["request"] = before


def _upload_header(entry: dict[str, Any]) -> dict[str, Any]:
    return entry.get("actions", {}).get("upload", {}).get("header") or {}


def _put(
    plain: Callable[..., Response], watch: Watch, method: str, url: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Response:
    if hasattr(options.get("data"), "read"):
        options["data"] = _Counted(options["data"], watch.count)
    started = time.monotonic()
    try:
        response = plain(method, url, *args, **options)
    except (Timeout, ConnectionError, ChunkedEncodingError) as error:
        if watch.in_parts:
            raise
        raise UploadBroken(f"The connection broke in an upload ({type(error).__name__})") from error
    finally:
        watch.seconds += time.monotonic() - started
    if response.status_code >= 500 and not watch.in_parts:
        hf_raise_for_status(response)
    return response


class _Counted:
    """A file that tells how much of it was read."""

    def __init__(self, stream: Any, told: Callable[[int], None]) -> None:
        self._stream = stream
        self._told = told
        self._size = super_len(stream) + stream.tell()

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
