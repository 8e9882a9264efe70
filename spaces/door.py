"""What is refused before Gradio reads it: files, large requests, and other names of this machine.

The app takes texts of a few kB. Gradio has routes for files nevertheless, which take any size from any page in the
browser of somebody who runs the app.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Bytes of a request. A prompt of 4,000 characters takes up to 48 kB in JSON, and the page sends its state with it.
MOST_BYTES = 1_000_000
# Ends of the paths of routes that take files.
_FILES = ("/upload", "/process_recording")
# The names of this machine in a browser, for an app that listens on it alone.
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class TooLarge(HTTPException):
    """A request goes on beyond MOST_BYTES. Of Starlette's type, which its routes pass on as it is."""

    def __init__(self) -> None:
        super().__init__(413, f"A request has at most {MOST_BYTES:,} bytes.")


class Door:
    """ASGI middleware.

    Args:
        hosts: Names in the Host header that are answered; None: all. Another name on the loopback address is that of a
            page whose author lets it point here (DNS rebinding), and reads the answers.
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
            if not begun:  # an app that is none of Starlette's routes
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
