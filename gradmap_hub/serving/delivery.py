"""Connects an HTTP request to its generations: ordered text, a time limit, cancellation on disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from starlette.types import Receive

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime.constraints import ConstraintError
from gradmap_hub.serving.metrics import Metrics, Outcome
from gradmap_hub.serving.problems import ApiError, internal, overloaded, stopping, too_slow
from gradmap_hub.serving.scheduler import Busy, Finished, Job, Scheduler, Stopped, Work

if TYPE_CHECKING:
    from gradmap_hub.runtime import TokenScore

log = logging.getLogger("gradmap_hub.serving")


class Disconnected(Exception):
    """The client has disconnected."""


@dataclass(frozen=True)
class Piece:
    """A part of one choice that became final. `index`: of the choice; `scores`: of the tokens of `text`, if asked for;
    `finished`: how the choice ended, in its last piece, whose text may be empty."""

    index: int
    text: str
    scores: Sequence[TokenScore] = ()
    finished: Finished | None = None


class Delivery:
    """Holds the jobs of a request, one per choice, for the duration of an `async with` block.

    Args:
        scheduler: admits the jobs.
        metrics: records the outcomes.
        receive: the ASGI callable of the request; its body is already read, so only the disconnect can follow.
        seconds: time limit of the whole request, from now.
        count: number of jobs.

    Raises:
        ApiError: on entry; 429 if slots and queue are full, 503 if the server has stopped.
    """

    def __init__(
        self, scheduler: Scheduler, metrics: Metrics, receive: Receive, seconds: float, count: int = 1
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._receive = receive
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._changed = asyncio.Event()
        self._gone = False
        self._outcome: Outcome = "cancelled"  # of jobs that have neither finished nor failed
        self._count = count
        self._jobs: list[Job] = []

    async def __aenter__(self) -> Self:
        loop, changed = asyncio.get_running_loop(), self._changed

        def wake() -> None:  # on the decode thread
            loop.call_soon_threadsafe(changed.set)

        try:
            self._jobs = self._scheduler.admit_all(wake, self._count)
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
        for job in self._jobs:
            job.cancel()
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        for job in self._jobs:
            finished = job.finished
            failed = job.error is not None and not isinstance(job.error, Stopped)
            self._metrics.generated(
                finished.reason if finished else "error" if failed else self._outcome,
                prompt_tokens=job.prompt_tokens,
                completion_tokens=job.completion_tokens,
                cached_tokens=job.cached_tokens,
                first_token_seconds=job.first_token_seconds,
                tokens_per_second=finished.tokens_per_second if finished else None,
            )

    async def prepare(self, prepared: Future[list[Work]]) -> list[Work]:
        """Wait for the input of every job, then until the first generation has a slot and starts; return the input.

        `prepared`: the future of the preparer.

        Raises:
            ApiError: `prepared` failed with it, the time limit passed, or a generation could not start.
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
            works = making.result()
        except asyncio.CancelledError:  # by the preparer, which stops
            raise stopping() from None
        except Exception:
            self._outcome = "error"
            raise
        try:
            for job, work in zip(self._jobs, works, strict=True):
                job.begin(work)
        except Stopped:
            raise stopping() from None
        while not any(job.started or job.ended for job in self._jobs):
            await self._wait()
        for job in self._jobs:
            self._check(job)
        return works

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the text of all choices as it becomes final, until every generation has ended.

        Raises:
            ApiError: a generation failed, or the time limit passed.
            Disconnected: the client disconnected.
        """
        running = dict(enumerate(self._jobs))
        while running:
            for index, job in list(running.items()):
                ended = job.ended
                text, scores = job.take()
                if text or scores:
                    yield Piece(index, text, scores)
                if ended:
                    self._check(job)
                    del running[index]
                    yield Piece(index, "", finished=job.finished)
            if running:
                await self._wait()

    @staticmethod
    def _check(job: Job) -> None:
        """Raise the error of a job as an `ApiError`, if it has one."""
        error = job.error
        if error is None:
            return
        if isinstance(error, Stopped):
            raise stopping()
        if isinstance(error, GradmapError):  # the engine rejects the prompt, or what the answer must be
            constrained = isinstance(error, ConstraintError) and job.work is not None
            param = job.work.constrained_by if constrained and job.work is not None else "prompt"
            raise ApiError(400, error.message, param=param, code="invalid_value")
        log.error("A generation failed", exc_info=error)
        raise internal()

    async def _wait(self) -> None:
        """Wait until the state of a job changes.

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
        for job in self._jobs:
            job.cancel()  # immediately: the request may be blocked in sending
        self._changed.set()
