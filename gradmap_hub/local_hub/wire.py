"""Below HTTP: close or reset the connection of a request."""

import asyncio
import os
import socket
import struct

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

_CUT = "local_hub.cut"
_TRANSPORT = "local_hub.transport"


class OpenProtocol(H11Protocol):
    """HTTP/1.1 protocol that exposes its transport to :class:`Wire` in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.app_state = {**self.app_state, _TRANSPORT: transport}


async def cut(send: Send, *, reset: bool) -> None:
    """End the connection without a complete response.

    Args:
        send: the ASGI send callable of the request.
        reset: reset the connection at once (RST); otherwise the bytes already sent still arrive.
    """
    await send({"type": _CUT, "reset": reset})


def is_cut(message: Message) -> bool:
    return message["type"] == _CUT


class Wire:
    """Carries out :func:`cut`. It must be the outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wire_send(message: Message) -> None:
            if not is_cut(message):
                await send(message)
                return
            transport: asyncio.Transport = scope["state"][_TRANSPORT]
            if message["reset"]:
                _reset(transport)
            else:
                transport.close()
            # If this returned before the server saw the disconnect, the server would try to send a response.
            while (await receive())["type"] != "http.disconnect":
                pass

        await self.app(scope, receive, wire_send)


def _reset(transport: asyncio.Transport) -> None:
    connection: socket.socket = transport.get_extra_info("socket")
    # A linger time of zero makes the system send RST instead of FIN.
    linger = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
