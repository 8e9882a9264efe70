"""What was asked of the hub, for tests to assert on and for people to read."""

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
    """One answered request. Tokens, signatures and bodies are never recorded.

    Args:
        method: GET, HEAD, POST, ...
        path: as it was sent, still quoted.
        status: of the answer; 499 when the client went away before it, 0 when a fault cut the connection
            instead of answering.
        user: None for anonymous requests, and for those a fault answered.
        query: as it was sent; empty where it is a signature.
        route: one of :data:`~gradmap_hub.local_hub.faults.ROUTES`; "none" where no route was found.
        received: how many bytes of the body had arrived by the time of the answer.
        host: the ``Host`` header, which tells the two ports of the hub apart.
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
    """A thread-safe list of requests, mirrored to a file of JSON lines when one is given."""

    def __init__(self, file: Path | None = None) -> None:
        self.requests: list[Request] = []
        self._file = file
        self._lock = threading.Lock()

    def add(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            if len(self.requests) > _KEPT:
                # A hub left running for weeks must not grow for ever.
                del self.requests[: _KEPT // 2]
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                with self._file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"time": stamp, **asdict(request)}) + "\n")


class LogMiddleware:
    """Records a request just before its answer leaves: a client that has the answer finds it logged."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self.app = app
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: dict[str, object] = scope.setdefault("state", {})
        path = scope["raw_path"].decode("ascii", "replace")
        # The query of these addresses is their signature.
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
