"""Slots and a bounded queue around one decode thread. No asyncio and no HTTP here.

The thread works in rounds: in each, every active generation decodes one token or prefills a part of its prompt. Decode
steps run as one batch if the graph supports it; each generation yields the same tokens as on its own. Requests beyond
slots and queue are refused immediately instead of waiting for an unknown time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Literal

from gradmap_hub.serving.engine import Answer, Engine

if TYPE_CHECKING:
    from gradmap_hub.runtime import Sampling, Scoring, TokenScore
    from gradmap_hub.runtime.constraints import Constraint
    from gradmap_hub.serving.tools import ToolUse

log = logging.getLogger("gradmap_hub.serving")

CONTEXTS_KEPT = 2  # default size of the prefix cache, in full contexts
_FIRST_GUESS_SECONDS = 2.0  # assumed duration of a generation before the first one ends
_SMOOTHING = 0.2  # weight of the latest generation in the mean duration
_MAX_RETRY_SECONDS = 60  # clients such as openai-python ignore a longer Retry-After


class Busy(Exception):
    """Slots and queue are full; `retry_seconds`: estimated time until the queue is empty."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"Slots and queue are full. Retry in {retry_seconds} s.")
        self.retry_seconds = retry_seconds


class Stopped(Exception):
    """The scheduler has stopped; it ends all unfinished jobs with this error."""


@dataclass(frozen=True)
class Work:
    """The input of one generation. `prompt`: token ids; `max_tokens`: limit of the output; `stop`: stop strings;
    `scoring`: which log-probabilities to deliver; `echo`: text that the answer begins with; `ignore_end`: end tokens do
    not end the output; `min_tokens`: before this many tokens, only `max_tokens` ends the output; `constraint`: which
    tokens the output may have; `constrained_by`: the request parameter that sets the constraint; `shown`: id to text of
    special tokens that the answer shows; `tools`: which the answer may call."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    scoring: Scoring | None = None
    echo: str = ""
    ignore_end: bool = False
    min_tokens: int = 0
    constraint: Constraint | None = None
    constrained_by: str = "response_format"
    shown: Mapping[int, str] | None = None
    tools: ToolUse | None = None


@dataclass(frozen=True)
class Finished:
    """The result of a generation that was not cancelled. `tokens_per_second`: decode speed, None below two tokens;
    `cached_tokens`: those of the prompt that needed no prefill."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float | None
    cached_tokens: int = 0


class _State(Enum):
    PREPARING = auto()  # admitted, the prompt is being tokenised
    QUEUED = auto()
    ACTIVE = auto()
    DONE = auto()


class Job:
    """A request in the scheduler, from admission to the end of the generation.

    The decode thread writes the attributes; any thread may read them. The decode thread calls `wake` after every
    change; it must not block. The text is complete once `ended` is true: read `ended` first, then call `take()`.
    """

    def __init__(self, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self.wake = wake
        self.admitted_at = time.monotonic()
        self.state = _State.PREPARING
        self.work: Work | None = None
        self.answer: Answer | None = None
        self.activated_at: float | None = None
        self.pieces: deque[tuple[str, Sequence[TokenScore]]] = deque()
        self.cancelled = False
        self.started = False
        self.first_token_seconds: float | None = None  # from admission, queueing included
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finished: Finished | None = None
        self.error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.error is not None

    def take(self) -> tuple[str, list[TokenScore]]:
        """Return the text that became final since the last call, and the scores of its tokens if they are asked for."""
        texts: list[str] = []
        scores: list[TokenScore] = []
        while self.pieces:
            text, scored = self.pieces.popleft()
            texts.append(text)
            scores += scored
        return "".join(texts), scores

    def begin(self, work: Work) -> None:
        """Queue the job for a slot; does not block. Called once.

        Raises:
            Stopped: the scheduler has stopped.
        """
        self._scheduler.enqueue(self, work)

    def cancel(self) -> None:
        """Cancel the job: immediately if it has no slot yet, otherwise after the current step. Idempotent."""
        self._scheduler.withdraw(self)


class Scheduler:
    """Runs the generations of one engine.

    Args:
        engine: the model; its batch is used by the decode thread only.
        slots: maximum number of concurrent generations.
        queue: maximum number of further jobs that wait for a slot.
        prefix_cache: size of the prefix cache in bytes; None: enough for CONTEXTS_KEPT full contexts.
    """

    def __init__(self, engine: Engine, *, slots: int, queue: int, prefix_cache: int | None = None) -> None:
        if prefix_cache is None:
            prefix_cache = CONTEXTS_KEPT * engine.context_length * engine.cache_bytes
        self._batch = engine.batch(slots, prefix_cache=prefix_cache, in_turn=True)
        self._slots = slots
        self._capacity = slots + queue
        self._changed = threading.Condition()
        # All four are guarded by `_changed`. Jobs admitted, but neither queued nor active, are being prepared.
        self._admitted = 0
        self._queued: deque[Job] = deque()
        self._active: list[Job] = []
        self._stopping = False
        self._mean_seconds = _FIRST_GUESS_SECONDS
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    # Called by other threads

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Admitted jobs without a slot."""
        return max(0, self._admitted - len(self._active))

    @property
    def full(self) -> bool:
        return self._admitted >= self._capacity

    @property
    def prefix_bytes(self) -> int:
        """Bytes in use by the prefix cache."""
        return self._batch.prefix_bytes

    @property
    def capacity(self) -> int:
        """Maximum number of admitted jobs: slots plus queue."""
        return self._capacity

    def retry_seconds(self) -> int:
        """Return the estimated time until the queue is empty, from recent durations: 1 to 60 s."""
        seconds = self._mean_seconds * max(1, self.waiting) / self._slots
        return min(_MAX_RETRY_SECONDS, max(1, math.ceil(seconds)))

    def admit(self, wake: Callable[[], None]) -> Job:
        """Admit a job. The caller must call `Job.begin` or `Job.cancel`, otherwise its place is never freed.

        Raises:
            Busy: slots and queue are full.
            Stopped: the scheduler has stopped.
        """
        return self.admit_all(wake, 1)[0]

    def admit_all(self, wake: Callable[[], None], count: int) -> list[Job]:
        """Admit `count` jobs of one request, or none of them; otherwise as `admit`.

        Raises:
            Busy: slots and queue have fewer than `count` free places.
            Stopped: the scheduler has stopped.
        """
        with self._changed:
            if self._stopping:
                raise Stopped
            if self._admitted + count > self._capacity:
                raise Busy(self.retry_seconds())
            self._admitted += count
        return [Job(self, wake) for _ in range(count)]

    def enqueue(self, job: Job, work: Work) -> None:
        """See `Job.begin`."""
        with self._changed:
            if self._stopping:
                raise Stopped
            if job.state is not _State.PREPARING:
                raise RuntimeError("Job.begin was called twice, or after cancel. Admit a new job.")
            job.work = work
            job.state = _State.QUEUED
            self._queued.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """See `Job.cancel`."""
        with self._changed:
            if job.state is _State.ACTIVE:
                job.cancelled = True
                return
            if job.state is _State.DONE:
                return
            if job.state is _State.QUEUED:
                self._queued.remove(job)
            job.state = _State.DONE
            self._admitted -= 1

    def stop(self, seconds: float = 10.0) -> None:
        """End every job with `Stopped`, then the thread; wait at most `seconds` for the current step. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    # Called by the decode thread

    def _run(self) -> None:
        while self._next_round():
            stepped = [job for job in tuple(self._active) if self._is_started(job)]
            pieces = self._step_all([job.answer for job in stepped])
            for job, piece in zip(stepped, pieces, strict=True):
                self._deliver(job, piece)
        for job in (*self._active, *self._queued):
            self._end(job, error=Stopped())

    def _next_round(self) -> bool:
        """Wait for work and fill free slots from the queue; return False once the scheduler stops."""
        with self._changed:
            while not (self._stopping or self._queued or self._active):
                self._changed.wait()
            while self._queued and len(self._active) < self._slots:
                job = self._queued.popleft()
                job.state = _State.ACTIVE
                job.activated_at = time.monotonic()
                self._active.append(job)
            return not self._stopping

    def _is_started(self, job: Job) -> bool:
        """Start a new job or end a cancelled one; return True for any other job, which takes a step in this round."""
        if job.cancelled:
            self._end(job)
            return False
        if job.answer is not None:
            return True
        work = job.work
        assert work is not None
        try:
            job.answer = self._batch.start(
                work.prompt,
                max_tokens=work.max_tokens,
                sampling=work.sampling,
                stop=work.stop,
                scoring=work.scoring,
                echo=work.echo,
                ignore_end=work.ignore_end,
                min_tokens=work.min_tokens,
                constraint=work.constraint,
                shown=work.shown,
            )
        except Exception as error:
            self._end(job, error=error)
            return False
        job.started = True
        self._wake(job)
        return False

    def _step_all(self, answers: Sequence[Answer | None]) -> Sequence[str | Exception]:
        try:
            return self._batch.step(answers) if answers else []
        except Exception as error:  # a batch returns the errors of its generations; this is another one
            log.exception("A round failed")
            return [error] * len(answers)

    def _deliver(self, job: Job, piece: str | Exception) -> None:
        """Store the result of a step. An error ends this job only."""
        answer, work = job.answer, job.work
        assert answer is not None and work is not None
        if isinstance(piece, Exception):
            self._end(job, error=piece)
            return
        try:
            job.prompt_tokens, job.completion_tokens = answer.prompt_tokens, answer.completion_tokens
            job.cached_tokens = answer.cached_tokens
            if job.first_token_seconds is None and job.completion_tokens:
                job.first_token_seconds = time.monotonic() - job.admitted_at
            scores: Sequence[TokenScore] = () if work.scoring is None else answer.take_scores()
            if piece or scores:
                job.pieces.append((piece, scores))
            reason = answer.finish_reason
            if reason is not None:
                self._end(job, reason=reason)
            elif piece:
                self._wake(job)
        except Exception as error:
            self._end(job, error=error)

    def _end(
        self, job: Job, *, reason: Literal["stop", "length", "cancelled"] | None = None, error: Exception | None = None
    ) -> None:
        """Free the slot, then wake the request: a client with a complete response finds the slot free."""
        answer, job.answer = job.answer, None
        speed = None
        if answer is not None:
            try:
                speed = answer.tokens_per_second
                if answer.finish_reason is None:
                    answer.cancel()
                answer.close()
            except Exception:  # the slot must be freed anyway
                log.exception("A generation could not be closed")
        with self._changed:
            if job in self._active:
                self._active.remove(job)
            elif job in self._queued:
                self._queued.remove(job)
            job.state = _State.DONE
            self._admitted -= 1
            if reason in ("stop", "length") and job.activated_at is not None:
                seconds = time.monotonic() - job.activated_at
                self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)
        if reason == "stop" or reason == "length":
            job.finished = Finished(reason, job.prompt_tokens, job.completion_tokens, speed, job.cached_tokens)
        else:
            job.error = error or Stopped()
        self._wake(job)

    @staticmethod
    def _wake(job: Job) -> None:
        try:
            job.wake()
        except Exception:  # the event loop is closed: no request waits for this job
            log.debug("The event loop of a finished job is closed", exc_info=True)
