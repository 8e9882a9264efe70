"""Connects an HTTP request to its generation: ordered text, a time limit, cancellation on disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self

from starlette.types import Receive

from gradmap_hub.errors import GradmapError
from gradmap_hub.serving.metrics import Metrics, Outcome
from gradmap_hub.serving.problems import ApiError, internal, overloaded, stopping, too_slow
from gradmap_hub.serving.scheduler import Busy, Finished, Job, Scheduler, Stopped, Work

if TYPE_CHECKING:
    from gradmap_hub.runtime import TokenScore

log = logging.getLogger("gradmap_hub.serving")


class Disconnected(Exception):
    """The client has disconnected."""


class Delivery:
    """Holds a job of the scheduler for the duration of an `async with` block.

    Args:
        scheduler: admits the job.
        metrics: records the outcome.
        receive: of the request; the body is already read, so only the disconnect is left to receive.
        seconds: time limit of the whole request, from now.

    Raises:
        ApiError: on entry; 429 if slots and queue are full, 503 if the server has stopped.
    """

    def __init__(self, scheduler: Scheduler, metrics: Metrics, receive: Receive, seconds: float) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._receive = receive
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._changed = asyncio.Event()
        self._gone = False
        self._outcome: Outcome = "cancelled"
        self.job: Job

    async def __aenter__(self) -> Self:
        loop, changed = asyncio.get_running_loop(), self._changed

        def wake() -> None:  # on the decode thread
            loop.call_soon_threadsafe(changed.set)

        try:
            self.job = self._scheduler.admit(wake)
        except Busy as busy:
            self._metrics.refused("queue_full")
            raise overloaded(busy.retry_seconds) from None
        except Stopped:
            raise stopping() from None
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        job = self.job
        job.cancel()
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        finished = job.finished
        self._metrics.generated(
            self._outcome,
            prompt_tokens=job.prompt_tokens,
            completion_tokens=job.completion_tokens,
            first_token_seconds=job.first_token_seconds,
            tokens_per_second=finished.tokens_per_second if finished else None,
        )

    async def prepare(self, prepared: Future[Work]) -> None:
        """Wait for the input, then until the generation has a slot and starts.

        Raises:
            ApiError: it is the error of `prepared`, the time limit passed, or the generation could not start.
            Disconnected: the client disconnected.
        """
        making = asyncio.wrap_future(prepared)
        making.add_done_callback(lambda _: self._changed.set())
        try:
            while not making.done():
                await self._wait()
        except BaseException:
            making.cancel()  # has an effect only before it starts
            raise
        try:
            work = making.result()
        except asyncio.CancelledError:  # by the preparer, which stops
            raise stopping() from None
        except Exception:
            self._outcome = "error"
            raise
        try:
            self.job.begin(work)
        except Stopped:
            raise stopping() from None
        while not self.job.started and not self.job.ended:
            await self._wait()
        self._check()

    async def pieces(self) -> AsyncIterator[tuple[str, list[TokenScore]]]:
        """Yield the text as it becomes final, with the scores of its tokens if asked for, until the generation ends.

        Raises:
            ApiError: the generation failed, or the time limit passed.
            Disconnected: the client disconnected.
        """
        while True:
            ended = self.job.ended
            text, scores = self.job.take()
            if text or scores:
                yield text, scores
            if ended:
                self._check()
                return
            await self._wait()

    def finished(self) -> Finished:
        """Return how the generation ended; call it after `pieces` is exhausted."""
        finished = self.job.finished
        assert finished is not None
        return finished

    def _check(self) -> None:
        job = self.job
        if job.finished is not None:
            self._outcome = job.finished.reason
        error = job.error
        if error is None:
            return
        if isinstance(error, Stopped):
            raise stopping()
        self._outcome = "error"
        if isinstance(error, GradmapError):  # the engine rejects the prompt
            raise ApiError(400, error.message, param="prompt", code="invalid_value")
        log.error("A generation failed", exc_info=error)
        raise internal()

    async def _wait(self) -> None:
        """Wait until the state of the job changes.

        Raises:
            ApiError: 504, the time limit passed.
            Disconnected: the client disconnected.
        """
        try:
            left = self._deadline - time.monotonic()
            if left <= 0:  # also if changes arrive continuously
                raise TimeoutError
            async with asyncio.timeout(left):
                await self._changed.wait()
        except TimeoutError:
            self._outcome = "timeout"
            raise too_slow(self._seconds) from None
        self._changed.clear()
        if self._gone:
            raise Disconnected

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self.job.cancel()  # immediately: the request may be blocked in sending
        self._changed.set()
