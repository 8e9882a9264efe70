"""Middleware: checks requests before they reach a route; records metrics and the access log afterwards.

It refuses requests under overload before their body is read, so that refusals stay cheap.
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
RESPONSES = "/v1/responses"
TOKENIZE = "/tokenize"
TOKENIZER_INFO = "/tokenizer_info"
DETOKENIZE = "/detokenize"
MODELS = "/v1/models"
HEALTH = "/health"
READY = "/ready"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
_NO_ANSWER = 499  # nginx's code: the client disconnected before the response
_ADMITTED = {CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE}  # they need a place in the scheduler
_OPEN = {HEALTH, READY}
_ROUTES = _ADMITTED | _OPEN | {MODELS, METRICS, OPENAPI, TOKENIZER_INFO}
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


def route_of(path: str) -> str:
    """Return the route name for metrics and the log: one of a fixed set."""
    if path in _ROUTES:
        return path
    return MODELS + "/{id}" if path.startswith(MODELS + "/") else "other"


class Door:
    """State shared by the gate and the server: whether new requests are accepted, and how many are in progress."""

    def __init__(self) -> None:
        self.closing = False  # set from another thread, once
        self.under_way = 0  # requests until the response is sent; changed by the event loop only


class Gate:
    """ASGI middleware around the routes: host, key, overload and shutdown checks."""

    def __init__(self, app: ASGIApp, settings: Settings, scheduler: Scheduler, metrics: Metrics, door: Door) -> None:
        self._app = app
        self._settings = settings
        self._scheduler = scheduler
        self._metrics = metrics
        self._door = door
        # Only on loopback: elsewhere we do not know the names of the machine.
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
            if status != _NO_ANSWER:  # the response has begun: only closing the connection signals the failure
                raise
            log.exception("A request failed")
            await internal().response()(scope, receive, counting_send)
        finally:
            self._door.under_way -= 1
            self._metrics.answered(route, status)
            access_log.info("%s %s %d %.3f s", scope["method"][:10], route, status, time.monotonic() - started)

    def _check(self, scope: Scope, route: str) -> None:
        """Check a request before its body is read.

        Raises:
            ApiError: 400, invalid host; 401, invalid key; 429, overload; 503, shutdown.
        """
        headers = Headers(scope=scope)
        self._check_host(headers)
        if self._key is not None and route not in _OPEN:
            self._check_key(headers, self._key)
        if route in _ADMITTED and scope["method"] == "POST":
            if self._door.closing:
                self._metrics.refused("shutting_down")
                raise stopping()
            if self._scheduler.full:
                self._metrics.refused("queue_full")
                raise overloaded(self._scheduler.retry_seconds())

    def _check_host(self, headers: Headers) -> None:
        """Prevent DNS rebinding: a web page can resolve its own host name to 127.0.0.1 and reach this server."""
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
                "The Host header does not name this machine. Use localhost, or serve with --allow-host NAME.",
                code="invalid_host",
            )

    def _check_key(self, headers: Headers, key: bytes) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), key)
        if scheme.lower() != "bearer" or not right:
            self._metrics.refused("unauthorized")
            raise ApiError(
                401,
                "The API key is incorrect. Send it as `Authorization: Bearer KEY`."
                if given
                else "The API key is missing. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Bearer realm="gradmap-hub"'},
            )
