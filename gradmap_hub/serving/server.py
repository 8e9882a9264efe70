"""Starting and stopping: sockets, threads, signals.

Three threads: the main one waits for signals, one runs the event loop (uvicorn), one decodes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Self

import uvicorn

from gradmap_hub.errors import GradmapError
from gradmap_hub.serving.api import build_app
from gradmap_hub.serving.gate import Door
from gradmap_hub.serving.protocol import PatientProtocol
from gradmap_hub.serving.scheduler import Engine, Scheduler
from gradmap_hub.serving.settings import Settings

log = logging.getLogger("gradmap_hub.serving")

_START_SECONDS = 30.0
_FAREWELL_SECONDS = 2  # for what is still to be sent once nothing is decoded any more
_LOOK_SECONDS = 0.02


class Server:
    """One model behind HTTP.

    Args:
        engine: a loaded `gradmap_hub.runtime.TextModel`.
        settings: address, limits, key.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._settings = settings
        self._door = Door()
        self._scheduler = Scheduler(engine, slots=settings.slots, queue=settings.queue)
        # One at a time: a tokeniser is fast, and what else runs needs the cores.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        self._app = build_app(engine, settings, self._scheduler, self._executor, self._door)
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        """The address, without a trailing slash.

        Raises:
            RuntimeError: the server is not running.
        """
        if self._port is None:
            raise RuntimeError("The server is not running")
        host = self._settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    @property
    def scheduler(self) -> Scheduler:
        """For those who want to know how many slots are taken."""
        return self._scheduler

    def start(self) -> None:
        """Listen, and return once requests are answered. A server starts once.

        Raises:
            GradmapError: the address cannot be bound to.
        """
        listener = _listen(self._settings.host, self._settings.port)
        config = uvicorn.Config(
            self._app,
            http=PatientProtocol,
            log_config=None,
            log_level="error",  # clients that do not speak HTTP are no news
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_FAREWELL_SECONDS,
        )
        self._uvicorn = server = uvicorn.Server(config)
        self._thread = thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
        self._port = listener.getsockname()[1]
        self._scheduler.start()
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise GradmapError("The HTTP server did not start.")
            time.sleep(0.005)

    def drain(self, seconds: float, at_once: threading.Event | None = None) -> bool:
        """Refuse new work and wait until what is under way has been answered; False if the time was not enough.

        The listener stays open meanwhile, so that new requests get a 503 they can act upon.
        """
        self._door.closing = True
        deadline = time.monotonic() + seconds
        while self._door.under_way and time.monotonic() < deadline:
            if at_once is not None and at_once.is_set():
                break
            time.sleep(_LOOK_SECONDS)
        return not self._door.under_way

    def stop(self) -> None:
        """End everything: generations that still run end with an error, connections are closed. Idempotent."""
        self._door.closing = True
        self._scheduler.stop()
        server, thread = self._uvicorn, self._thread
        if server is not None and thread is not None and thread.is_alive():
            server.should_exit = True
            thread.join(_FAREWELL_SECONDS + 3)
            if thread.is_alive():
                server.force_exit = True
                thread.join(_FAREWELL_SECONDS)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._port = None

    def serve_forever(self, started: Callable[[str], None]) -> None:
        """Serve until SIGINT or SIGTERM, then finish what is under way (at most `drain` seconds; a second signal ends
        at once) and return. Call it from the main thread: signals reach no other.

        Args:
            started: called with the address as soon as requests are answered and signals are handled.

        Raises:
            GradmapError: the address cannot be bound to, or the server died.
        """
        asked, at_once = threading.Event(), threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            (at_once if asked.is_set() else asked).set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start()
            started(self.url)
            # The timeout is for Windows, where a wait without one cannot be interrupted.
            while not asked.wait(0.5):
                if self._thread is None or not self._thread.is_alive():
                    raise GradmapError("The HTTP server ended unexpectedly.")
            under_way = self._door.under_way
            log.info("Stopping; %d requests under way are finished first.", under_way)
            if not self.drain(self._settings.drain, at_once):
                log.warning("%d requests were cut short.", self._door.under_way)
        finally:
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    """Bound here rather than by uvicorn: the port is known at once, and so is what is wrong with it.

    Raises:
        GradmapError: no such address here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise GradmapError(f"The server cannot listen on {host}: {error.strerror or error}.") from error
    try:
        if os.name == "posix":
            # A server that was just stopped leaves its port waiting for stray packets.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise GradmapError(
            f"The server cannot listen on {host} port {port}: {error.strerror or error}.",
            hint="Choose another port with --port; 0 takes any free one.",
        ) from error
    return listener
