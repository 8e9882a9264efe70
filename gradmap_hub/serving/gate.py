"""What happens to a request before a route sees it, and what is noted once it is answered.

Refusals under load are made here, before a body is read: they must stay cheap when everything else is busy.
"""

from __future__ import annotations

import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradmap_hub.serving.metrics import Metrics
from gradmap_hub.serving.problems import ApiError, internal, overloaded, stopping
from gradmap_hub.serving.scheduler import Scheduler
from gradmap_hub.serving.settings import Settings

log = logging.getLogger("gradmap_hub.serving")
access_log = logging.getLogger("gradmap_hub.serving.access")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
HEALTH = "/health"
READY = "/ready"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
_NO_ANSWER = 499  # as nginx calls it: the client went before there was one
_GENERATING = {CHAT, COMPLETIONS}
_OPEN = {HEALTH, READY}
_ROUTES = _GENERATING | _OPEN | {MODELS, METRICS, OPENAPI}
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


def route_of(path: str) -> str:
    """The route for metrics and the log: one of a few, whatever the path."""
    if path in _ROUTES:
        return path
    return MODELS + "/{id}" if path.startswith(MODELS + "/") else "other"


class Door:
    """What the gate and the server share: whether new work is let in, and how much is under way."""

    def __init__(self) -> None:
        self.closing = False  # set from another thread, once
        self.under_way = 0  # requests, the sending of the answer included; changed by the event loop only


class Gate:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, settings: Settings, scheduler: Scheduler, metrics: Metrics, door: Door) -> None:
        self._app = app
        self._settings = settings
        self._scheduler = scheduler
        self._metrics = metrics
        self._door = door
        # Only on loopback: elsewhere the names under which the machine is known are not ours to guess.
        names = {*_LOCAL_NAMES, settings.host, *settings.allow_hosts}
        self._hosts = {name.lower() for name in names} if settings.loopback else None
        self._key = None if settings.api_key is None else settings.api_key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.monotonic()
        route = route_of(scope["path"])
        status = _NO_ANSWER

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._door.under_way += 1
        try:
            try:
                self._check(scope, route)
            except ApiError as error:
                await error.response()(scope, receive, counting_send)
            else:
                await self._app(scope, receive, counting_send)
        except Exception:
            if status != _NO_ANSWER:  # an answer has begun: only the end of the connection can say that it is cut short
                raise
            log.exception("A request failed")
            await internal().response()(scope, receive, counting_send)
        finally:
            self._door.under_way -= 1
            self._metrics.answered(route, status)
            access_log.info("%s %s %d %.3f s", scope["method"][:10], route, status, time.monotonic() - started)

    def _check(self, scope: Scope, route: str) -> None:
        """Raises ApiError for what is refused unread."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        if self._key is not None and route not in _OPEN:
            self._check_key(headers, self._key)
        if route in _GENERATING and scope["method"] == "POST":
            if self._door.closing:
                self._metrics.refused("shutting_down")
                raise stopping()
            if self._scheduler.full:
                self._metrics.refused("queue_full")
                raise overloaded(self._scheduler.retry_seconds())

    def _check_host(self, headers: Headers) -> None:
        """A web page can point a name of its own at 127.0.0.1 and have the browser talk to us (DNS rebinding)."""
        if self._hosts is None:
            return
        hosts = headers.getlist("host")
        try:
            name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
        except ValueError:
            name = None
        if name is None or name not in self._hosts:
            raise ApiError(
                400,
                "The Host header does not name this machine. Use localhost, or allow the name with --allow-host.",
                code="invalid_host",
            )

    def _check_key(self, headers: Headers, key: bytes) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), key)
        if scheme.lower() != "bearer" or not right:
            self._metrics.refused("unauthorized")
            raise ApiError(
                401,
                "Incorrect API key. Send it as `Authorization: Bearer KEY`."
                if given
                else "An API key is needed. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Bearer realm="gradmap-hub"'},
            )
