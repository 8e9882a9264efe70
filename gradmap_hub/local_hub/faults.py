"""Fault injection: failures that a client must survive, triggered at a named route.

A fault applies after its request is routed, before tokens and bodies are read.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, get_args

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .wire import cut

#: The names of all routes, used by faults and the request log.
ROUTES = (
    "whoami",
    "repo-create",
    "repo-delete",
    "repo-move",
    "repo-settings",
    "repo-list",
    "repo-info",
    "tree",
    "paths-info",
    "refs",
    "commits",
    "branch",
    "tag",
    "auth-check",
    "validate-yaml",
    "preupload",
    "lfs-batch",
    "lfs-put",
    "lfs-part",
    "lfs-complete",
    "lfs-verify",
    "xet-token",
    "xet-xorb",
    "xet-shard",
    "commit",
    "resolve-head",
    "resolve-get",
    "cdn-get",
    "space-variables",
    "space-secrets",
    "space-runtime",
    "space-restart",
    "space-pause",
    "space-hardware",
    "space-sleeptime",
    "collections",
    "discussions",
    "page",
    "static",
)

#: Matches every route; ``skip`` and ``times`` count the requests of all routes together.
ANY = "*"

Kind = Literal["status", "reset-before", "reset-after", "slow", "truncate"]

_SLICES = 20


@dataclass(frozen=True)
class Fault:
    """One failure at one route.

    Args:
        route: one of :data:`ROUTES`, or :data:`ANY`.
        kind: "status" returns an error and does nothing else. "reset-before" resets the connection before the
            request takes effect, "reset-after" afterwards (a commit lands, its response is lost). "slow" spreads
            the response body over ``seconds`` (a response without a body is delayed). "truncate" announces the
            whole body, sends half of it and closes the connection.
        status: the HTTP status, 400 to 599, for "status".
        retry_after: the ``Retry-After`` header, for "status".
        rate_limit: the ``RateLimit`` header, for "status", such as ``'"api";r=0;t=1'``.
        message: ``X-Error-Message`` and the JSON body, for "status"; by default the status phrase.
        times: the number of requests to fail.
        skip: the number of requests to let through first.
        seconds: the duration of the response, for "slow".
        then: a callback that runs before the request takes effect ("reset-after": afterwards), for example to kill
            the client. It blocks the server.

    Raises:
        ValueError: an unknown route or kind, or a number out of range.
    """

    route: str
    kind: Kind
    status: int = 500
    retry_after: str | None = None
    rate_limit: str | None = None
    message: str | None = None
    times: int = 1
    skip: int = 0
    seconds: float = 1.0
    then: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.route not in (*ROUTES, ANY):
            raise ValueError(f"Unknown route {self.route!r}; routes are {', '.join(ROUTES)}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"Unknown kind of fault {self.kind!r}; kinds are {', '.join(get_args(Kind))}")
        if not 400 <= self.status <= 599 or self.times < 1 or self.skip < 0 or self.seconds < 0:
            raise ValueError(f"status must be 4xx or 5xx, times positive, skip and seconds non-negative: {self}")


@dataclass
class _Armed:
    fault: Fault
    skip: int
    left: int


class Faults:
    """The armed faults of a hub. Thread-safe. Faults stay armed across restarts until used up or cleared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[_Armed] = []
        self._fired: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Arm a fault. If several match a request, the one added first fires.

        A request on which another fault fires counts towards ``skip``.
        """
        with self._lock:
            self._armed.append(_Armed(fault, fault.skip, fault.times))

    def clear(self) -> None:
        """Disarm all faults and forget those that fired."""
        with self._lock:
            self._armed.clear()
            self._fired.clear()

    @property
    def fired(self) -> list[Fault]:
        """The faults that fired, in order, one entry per request."""
        with self._lock:
            return list(self._fired)

    def take(self, route: str) -> Fault | None:
        """Count a request and return the fault that it triggers, if any."""
        with self._lock:
            hit: Fault | None = None
            for armed in [armed for armed in self._armed if armed.fault.route in (route, ANY)]:
                if armed.skip:
                    armed.skip -= 1
                elif hit is None:
                    hit = armed.fault
                    armed.left -= 1
                    self._fired.append(hit)
            self._armed = [armed for armed in self._armed if armed.left]
            return hit


class FaultPoint:
    """Names the route for the request log and triggers its faults."""

    def __init__(self, app: ASGIApp, faults: Faults, route: str) -> None:
        self.app = app
        self.faults = faults
        self.route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["route"] = self.route
        fault = self.faults.take(self.route)
        then = (fault and fault.then) or _nothing
        if fault and fault.kind != "reset-after":
            then()
        match fault.kind if fault else None:
            case "status":
                assert fault is not None
                await _drain(receive)
                await _refusal(fault)(scope, receive, send)
            case "reset-before":
                await cut(send, reset=True)
            case "reset-after":
                await self.app(scope, receive, _nowhere)
                then()
                await cut(send, reset=True)
            case "slow":
                assert fault is not None
                await self.app(scope, receive, _Slowly(send, fault.seconds, scope["method"] == "HEAD"))
            case "truncate":
                await self.app(scope, receive, _Half(send))
            case None:
                await self.app(scope, receive, send)


class _Slowly:
    """Sends the body in slices over ``seconds``; delays a response without a body."""

    def __init__(self, send: Send, seconds: float, head: bool) -> None:
        self._send = send
        self._seconds = seconds
        self._head = head
        self._start: Message = {}
        self._size = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Held back until it is known whether a body follows.
            self._start, self._size = message, _content_length(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._start:
            if self._head or not (body or more):
                await asyncio.sleep(self._seconds)
            await self._send(self._start)
            self._start = {}
        if self._head:
            await self._send(message)
            return
        async for piece in self._dribbled(body):
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": more})

    async def _dribbled(self, body: bytes) -> AsyncIterator[bytes]:
        size = max(self._size, len(body))
        step = max(size // _SLICES, 1)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            await asyncio.sleep(self._seconds * len(piece) / size)
            yield piece


class _Half:
    """Sends the first half of the announced body and closes the connection."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._left = 0
        self._closed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._left = _content_length(message) // 2
            await self._send(message)
        elif not self._closed:
            body = message.get("body", b"")[: self._left]
            self._left -= len(body)
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            if not self._left or not message.get("more_body", False):
                self._closed = True
                await cut(self._send, reset=False)


def _nothing() -> None: ...


async def _nowhere(message: Message) -> None:
    """Discards the response."""


async def _drain(receive: Receive) -> None:
    # The client sees a response in the middle of an upload as a broken connection.
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def _refusal(fault: Fault) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    try:
        phrase = HTTPStatus(fault.status).phrase
    except ValueError:
        phrase = str(fault.status)
    message = phrase if fault.message is None else fault.message
    headers = {"X-Error-Message": message.encode("ascii", "backslashreplace").decode()}
    if fault.retry_after is not None:
        headers["Retry-After"] = fault.retry_after
    if fault.rate_limit is not None:
        headers["RateLimit"] = fault.rate_limit
    return JSONResponse({"error": message}, status_code=fault.status, headers=headers)


def _content_length(message: Message) -> int:
    return next((int(value) for name, value in message["headers"] if name.lower() == b"content-length"), 0)
