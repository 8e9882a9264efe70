"""One generation as its HTTP request sees it: in order, within the time limit, given up when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import Self

from starlette.types import Receive

from gradmap_hub.errors import GradmapError
from gradmap_hub.serving.metrics import Metrics, Outcome
from gradmap_hub.serving.problems import ApiError, internal, overloaded, stopping, too_slow
from gradmap_hub.serving.scheduler import Busy, Finished, Job, Scheduler, Stopped, Work

log = logging.getLogger("gradmap_hub.serving")


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""


class Delivery:
    """A place in the scheduler, held for as long as the `async with` lasts.

    Args:
        scheduler: where the place is.
        metrics: told how it ended.
        receive: of the request, its body already read: what still comes is the disconnect.
        seconds: time limit for everything, from now.

    Raises (on entering):
        ApiError: 429, there is no place; 503, the server has stopped.
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

    async def prepare(self, executor: Executor, make: Callable[[], Work]) -> None:
        """Make the work elsewhere, then wait for a slot and until decoding has begun.

        Raises:
            ApiError: `make` raised it, or decoding could not begin.
            Disconnected: meanwhile the client went.
        """
        making = asyncio.get_running_loop().run_in_executor(executor, make)
        making.add_done_callback(lambda _: self._changed.set())
        try:
            while not making.done():
                await self._wait()
        except BaseException:
            making.cancel()  # does not happen at all if it has not begun
            raise
        try:
            work = making.result()
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

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it becomes final; ends with the generation. Raises as `prepare`."""
        while True:
            ended = self.job.ended
            text = self.job.take()
            if text:
                yield text
            if ended:
                self._check()
                return
            await self._wait()

    def finished(self) -> Finished:
        """How the generation ended, once `pieces` has."""
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
        if isinstance(error, GradmapError):  # a prompt that the engine refuses after all
            raise ApiError(400, error.message, param="prompt", code="invalid_value")
        log.error("A generation failed", exc_info=error)
        raise internal()

    async def _wait(self) -> None:
        """Until something has changed."""
        try:
            left = self._deadline - time.monotonic()
            if left <= 0:  # also when there is something new all the time
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
        self.job.cancel()  # here and now: the request may be held up in sending
        self._changed.set()
