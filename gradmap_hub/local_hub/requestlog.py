"""The request log, for tests and for debugging."""

import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .wire import is_cut

_KEPT = 50_000
_SIGNED = ("/lfs/", "/cdn/")


@dataclass(frozen=True)
class Request:
    """One completed request. Tokens, signatures and bodies are never recorded.

    Args:
        method: GET, HEAD, POST, ...
        path: as sent, still quoted.
        status: of the response; 499 if the client disconnected first, 0 if a fault reset the connection.
        user: None for anonymous requests and those that a fault intercepted.
        query: as sent; empty if it is a signature.
        route: one of :data:`~gradmap_hub.local_hub.faults.ROUTES`, or "none" if no route matched.
        received: bytes of the body received before the response.
        host: the ``Host`` header, which identifies the port.
    """

    method: str
    path: str
    status: int
    user: str | None
    query: str = ""
    route: str = "none"
    received: int = 0
    host: str = ""


class RequestLog:
    """A thread-safe list of requests, optionally mirrored to a JSON Lines file."""

    def __init__(self, file: Path | None = None) -> None:
        self.requests: list[Request] = []
        self._file = file
        self._lock = threading.Lock()

    def add(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            if len(self.requests) > _KEPT:
                # Bound the memory of a long-running hub.
                del self.requests[: _KEPT // 2]
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                with self._file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"time": stamp, **asdict(request)}) + "\n")


class LogMiddleware:
    """Records a request just before its response is sent, so a client that has the response finds it in the log."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self.app = app
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: dict[str, object] = scope.setdefault("state", {})
        path = scope["raw_path"].decode("ascii", "replace")
        # The query of these URLs is their signature.
        query = "" if path.startswith(_SIGNED) else scope["query_string"].decode("ascii", "replace")
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("ascii", "replace")
        answered = False
        received = 0

        def record(status: int) -> None:
            nonlocal answered
            answered = True
            user, route = state.get("user"), state.get("route")
            self.log.add(
                Request(
                    method=scope["method"],
                    path=path,
                    status=status,
                    user=user if isinstance(user, str) else None,
                    query=query,
                    route=route if isinstance(route, str) else "none",
                    received=received,
                    host=host,
                )
            )

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def logging_send(message: Message) -> None:
            if not answered and (message["type"] == "http.response.start" or is_cut(message)):
                record(message.get("status", 0))
            await send(message)

        try:
            await self.app(scope, counting_receive, logging_send)
        finally:
            if not answered:
                record(499)
