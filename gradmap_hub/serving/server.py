"""Starts and stops the server: sockets, threads, signals.

It uses four threads: the main thread waits for signals, one runs the event loop (uvicorn), one tokenises, one decodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import Self, cast

import uvicorn

from gradmap_hub.errors import GradmapError
from gradmap_hub.serving.api import build_app
from gradmap_hub.serving.engine import Engine
from gradmap_hub.serving.gate import Door
from gradmap_hub.serving.preparing import Preparer
from gradmap_hub.serving.protocol import PatientProtocol
from gradmap_hub.serving.scheduler import Scheduler
from gradmap_hub.serving.settings import MAX_CONNECTIONS, Settings

log = logging.getLogger("gradmap_hub.serving")

_START_SECONDS = 30.0
_FAREWELL_SECONDS = 2  # to send the remaining responses after decoding has stopped
_LOOK_SECONDS = 0.02
_BACKLOG = 100  # connections accepted at once, before any other is closed; asyncio's default, uvicorn's is 2048
_RECORDS_PER_MINUTE = 10


class Server:
    """An HTTP server for one model.

    Args:
        engine: a loaded `gradmap_hub.runtime.TextModel`.
        settings: address, limits, key.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._settings = settings
        self._door = Door()
        self._scheduler = Scheduler(
            engine, slots=settings.slots, queue=settings.queue, prefix_cache=settings.prefix_cache
        )
        self._preparer = Preparer()
        self._sparse = _Sparse()
        self._app = build_app(engine, settings, self._scheduler, self._preparer, self._door)
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        """The address of the server, without a trailing slash.

        Raises:
            RuntimeError: the server is not running.
        """
        if self._port is None:
            raise RuntimeError("The server is not running. Call start() first.")
        host = self._settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, to read the number of active and waiting jobs."""
        return self._scheduler

    def start(self) -> None:
        """Start the threads and return once the server answers requests. A server can start only once.

        Raises:
            GradmapError: the server cannot listen on the address, or did not start within 30 seconds.
        """
        listener = _listen(self._settings.host, self._settings.port)
        config = uvicorn.Config(
            self._app,
            http=cast("type[asyncio.Protocol]", partial(PatientProtocol, most=_most_connections(self._settings))),
            backlog=_BACKLOG,
            log_config=None,
            log_level="error",  # uvicorn warns about every client that sends invalid HTTP
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_FAREWELL_SECONDS,
        )
        self._uvicorn = server = uvicorn.Server(config)
        self._thread = thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
        self._port = listener.getsockname()[1]
        logging.getLogger("asyncio").addFilter(self._sparse)
        self._scheduler.start()
        self._preparer.start()
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise GradmapError(
                    f"The HTTP server failed or took more than {_START_SECONDS:g} s to start. See the log."
                )
            time.sleep(0.005)

    def drain(self, seconds: float, at_once: threading.Event | None = None) -> bool:
        """Refuse new requests and wait for those in progress; return whether all finished within `seconds`.

        The listener stays open meanwhile, so that new requests get a 503. `at_once`: ends the wait when set.
        """
        self._door.closing = True
        deadline = time.monotonic() + seconds
        while self._door.under_way and time.monotonic() < deadline:
            if at_once is not None and at_once.is_set():
                break
            time.sleep(_LOOK_SECONDS)
        return not self._door.under_way

    def stop(self) -> None:
        """Stop the server: end running generations with an error and close all connections. Idempotent."""
        self._door.closing = True
        self._preparer.stop()
        self._scheduler.stop()
        server, thread = self._uvicorn, self._thread
        if server is not None and thread is not None and thread.is_alive():
            server.should_exit = True
            thread.join(_FAREWELL_SECONDS + 3)
            if thread.is_alive():
                server.force_exit = True
                thread.join(_FAREWELL_SECONDS)
        logging.getLogger("asyncio").removeFilter(self._sparse)
        self._port = None

    def serve_forever(self, started: Callable[[str], None]) -> None:
        """Serve until SIGINT or SIGTERM, then finish the requests in progress and return.

        Finishing takes at most `Settings.drain` seconds; a second signal stops the server immediately. Call it from the
        main thread, since Python allows signal handlers there only.

        Args:
            started: called with the address once the server answers requests and handles signals.

        Raises:
            GradmapError: the server cannot listen on the address, or ended unexpectedly.
        """
        asked, at_once = threading.Event(), threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            (at_once if asked.is_set() else asked).set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start()
            started(self.url)
            # On Windows, a wait without a timeout cannot be interrupted.
            while not asked.wait(0.5):
                if self._thread is None or not self._thread.is_alive():
                    raise GradmapError("The HTTP server ended unexpectedly. See the log.")
            under_way = self._door.under_way
            log.info("Shutting down after %d requests in progress.", under_way)
            if not self.drain(self._settings.drain, at_once):
                log.warning("%d requests were cancelled at shutdown.", self._door.under_way)
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


class _Sparse(logging.Filter):
    """Lets 10 records per minute pass: without free file descriptors, asyncio logs every failed accept."""

    def __init__(self) -> None:
        super().__init__()
        self._minute = self._passed = 0

    def filter(self, record: logging.LogRecord) -> bool:
        minute = int(record.created // 60)
        if minute != self._minute:
            self._minute, self._passed = minute, 0
        self._passed += 1
        return self._passed <= _RECORDS_PER_MINUTE


def _most_connections(settings: Settings) -> int:
    """Return how many connections may be open: enough for all slots and the queue, if the system allows that."""
    wanted = max(MAX_CONNECTIONS, 4 * (settings.slots + settings.queue))
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The other half is for connections accepted before others are closed, and for the files of the process.
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(1, files // 2))


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Bound here and not by uvicorn, to know the port and report errors.

    Raises:
        GradmapError: this machine does not have the address, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise GradmapError(
            f"The server cannot listen on {host}: {error.strerror or error}.", hint="Check --host."
        ) from error
    try:
        if os.name == "posix":
            # The port of a server that has just stopped stays in TIME_WAIT for a while.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise GradmapError(
            f"The server cannot listen on {host} port {port}: {error.strerror or error}.",
            hint="Choose another port with --port; 0 selects a free one.",
        ) from error
    return listener
