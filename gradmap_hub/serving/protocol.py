"""uvicorn's HTTP/1.1 with limits for clients that stall: they send no request, or do not read the response.

Such clients cannot hold a slot, since a generation never waits for its client; but they would hold a connection.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.settings import HEAD_SECONDS, MAX_CONNECTIONS, STALL_SECONDS


class PatientProtocol(H11Protocol):
    """One connection, closed if the client stalls for `HEAD_SECONDS` or `STALL_SECONDS`.

    If there are more than `most` connections, one that waits for its client is closed for the new one: first those that
    never sent a whole request, the oldest first. A server that runs out of file descriptors cannot accept
    connections, and logs every attempt.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, most: int = MAX_CONNECTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self._opened = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self._most:
            self._make_room()

    def _make_room(self) -> None:
        held = [each for each in self.connections if isinstance(each, PatientProtocol)]
        held = [each for each in held if not each.transport.is_closing()]
        if len(held) > self._most:
            others = [each for each in held if each is not self and each._awaits_client]
            victim = min(others, key=lambda each: (each._has_served, each._opened), default=self)
            victim.transport.abort()

    @property
    def _has_served(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    @property
    def _awaits_client(self) -> bool:
        """Whether there is no request yet, or only a part of one."""
        return self.cycle is None or self.cycle.response_complete or self.conn.their_state is h11.SEND_BODY

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_timer = _cancelled(self._head_timer)
        else:  # part of a request head, or the rest of a refused body
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self._give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_timer = _cancelled(self._stall_timer)

    def send_400_response(self, msg: str) -> None:
        """Send the error for invalid HTTP in the same format as all other errors."""
        try:
            body = json.dumps(ApiError(400, msg, code="invalid_http").body()).encode()
            head = h11.Response(
                status_code=400,
                reason=b"Bad Request",
                headers=[
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                ],
            )
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # a response has begun; it ends here
            pass
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = self._stall_timer = None
        if not self.transport.is_closing() or self.flow.write_paused:
            self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
