"""What was asked of the hub, for tests to assert on and for people to read."""

import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEPT = 50_000


@dataclass(frozen=True)
class Request:
    """One answered request. Tokens, signatures and bodies are never recorded.

    ``path`` is as it was sent (still quoted), ``user`` is None for anonymous requests, ``status`` is 499
    when the client went away before the answer.
    """

    method: str
    path: str
    status: int
    user: str | None
    query: str = ""


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
        # The query of an upload address is its signature.
        query = "" if path.startswith("/lfs/") else scope["query_string"].decode("ascii", "replace")
        answered = False

        def record(status: int) -> None:
            user = state.get("user")
            self.log.add(Request(scope["method"], path, status, user if isinstance(user, str) else None, query))

        async def logging_send(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                record(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, logging_send)
        finally:
            if not answered:
                record(499)
