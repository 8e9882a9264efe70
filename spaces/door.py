"""Refuses requests before Gradio reads them: file uploads, large bodies, and other names of this machine.

The app accepts prompts of a few kB. Gradio still has upload routes, which accept files of any size from any web page
that is open in the browser of a person who runs the app.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Limit in bytes of a request. A prompt of 4,000 characters takes up to 48 kB in JSON, and the page adds its state.
MOST_BYTES = 1_000_000
# Path endings of the routes that accept files.
_FILES = ("/upload", "/process_recording")
# The names of this machine in a browser, for an app that listens on it alone.
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class TooLarge(HTTPException):
    """A request body exceeds MOST_BYTES. Starlette's routes pass on its own exception type unchanged."""

    def __init__(self) -> None:
        super().__init__(413, f"A request has at most {MOST_BYTES:,} bytes.")


class Door:
    """ASGI middleware that refuses file uploads, bodies above MOST_BYTES and unknown hosts.

    Args:
        app: The application behind it.
        hosts: Accepted names in the Host header; None: all. On the loopback address, any other name is a sign of DNS
            rebinding: the host name of a web page resolves to this machine, so that the page can read the responses.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        read, begun = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except TooLarge:
            if not begun:  # the app is not one of Starlette's routes
                await _too_large()(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> Any:
        if self._hosts is not None and _name(headers.get(b"host", "")) not in self._hosts:
            return PlainTextResponse("This app answers on localhost only.", 421)
        if scope["method"] == "POST" and scope["path"].rstrip("/").endswith(_FILES):
            return PlainTextResponse("This app takes no files.", 403)
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return _too_large()
        return None


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _too_large() -> PlainTextResponse:
    return PlainTextResponse(TooLarge().detail, 413)
