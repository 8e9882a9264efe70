"""Tokenises prompts, the shortest first, on a thread separate from the event loop and the decode thread."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from gradmap_hub.serving.settings import STUCK_SECONDS

Made = TypeVar("Made")


class Preparer:
    """One daemon thread: tokenisation is fast, decoding needs the cores, and a thread that hangs in a tokenizer
    must not keep the process from ending.

    The shortest prompt comes first, so that a few long ones do not delay all others. The queue is bounded by the
    scheduler, which admits every request before its prompt gets here.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Guarded by `_changed`: (characters, number, task, future). The number keeps the order of equal lengths.
        self._queue: list[tuple[int, int, Callable[[], object], Future[object]]] = []
        self._numbers = itertools.count()
        self._stopping = False
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name="tokenise", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel the tasks that have not begun. A running task ends when done, or with the process. Idempotent."""
        with self._changed:
            self._stopping = True
            for *_, future in self._queue:
                future.cancel()
            self._queue.clear()
            self._changed.notify()

    @property
    def stuck(self) -> bool:
        """Whether a task takes longer than any prompt does, so that all others wait for it."""
        began = self._began
        return began is not None and time.monotonic() - began > STUCK_SECONDS

    def submit(self, characters: int, make: Callable[[], Made]) -> Future[Made]:
        """Run `make` on the thread; return the future of its result, cancelled if the preparer has stopped.

        `characters`: length of the prompt, by which tasks are ordered. Cancelling the future has an effect only before
        `make` begins.
        """
        future: Future[Made] = Future()
        with self._changed:
            if self._stopping:
                future.cancel()
                return future
            # Drop cancelled tasks: while a task is stuck, clients that come and go would fill the memory.
            self._queue = [entry for entry in self._queue if not entry[3].cancelled()]
            self._queue.append((characters, next(self._numbers), make, future))  # pyright: ignore[reportArgumentType]
            heapq.heapify(self._queue)
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                _, _, make, future = heapq.heappop(self._queue)
            if not future.set_running_or_notify_cancel():
                continue
            self._began = time.monotonic()
            try:
                future.set_result(make())
            except BaseException as error:  # every error belongs to the request, and the thread serves the next one
                future.set_exception(error)
            finally:
                self._began = None
