"""Slots, queue and turns, with an engine whose every step is known."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gradmap_hub.serving.scheduler import Busy, Job, Scheduler, Stopped, Work


class Counting:
    """Says the numbers from 1 on; a prompt of [n] makes step n fail. Steps wait for `pass_on` if there is a gate."""

    name, artifact, provider, context_length, chat_template = "counting", "none", "none", 100, None
    vocabulary = 100
    cache_bytes = prefix_bytes = 0
    tool_format, call_tokens, special_tokens = None, {}, {}

    def __init__(self, gate: threading.Semaphore | None = None) -> None:
        self.gate = gate
        self.steps: list[int] = []  # the first prompt token of whoever was stepped
        self.open = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [len(text)]

    def encode_chat(self, messages: Sequence[Any], **_: Any) -> list[int]:
        return [len(messages)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return b""

    def is_special(self, token: int) -> bool:
        return False

    def constrain(self, schema: Any) -> Any:
        raise AssertionError("nobody asked for a format")

    def start(self, prompt_ids: Sequence[int], *, max_tokens: int, **_: Any) -> Any:
        self.open += 1
        return _Count(self, prompt_ids, max_tokens)

    def batch(self, rows: int, **_: Any) -> Counting:
        return self

    def step(self, answers: Sequence[Any]) -> list[str | Exception]:
        found: list[str | Exception] = []
        for answer in answers:
            try:
                found.append(answer.advance())
            except RuntimeError as error:
                found.append(error)
        return found


class _Count:
    def __init__(self, engine: Counting, prompt: Sequence[int], most: int) -> None:
        self.engine, self.prompt, self.most = engine, prompt, most
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = len(prompt), 0, 0
        self.finish_reason: Any = None
        self.tokens_per_second = 1.0
        self.closed = False

    def advance(self) -> str:
        if self.engine.gate is not None:
            self.engine.gate.acquire()
        self.engine.steps.append(self.prompt[0])
        self.completion_tokens += 1
        if self.prompt[0] < 0 and self.completion_tokens == -self.prompt[0]:
            raise RuntimeError("as asked")
        if self.completion_tokens == self.most:
            self.finish_reason = "length"
        return f"{self.completion_tokens} "

    def take_scores(self) -> list[Any]:
        raise AssertionError("nobody asked for scores")

    def cancel(self) -> None:
        self.finish_reason = "cancelled"

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.engine.open -= 1


def work(token: int, most: int = 5) -> Work:
    return Work([token], most, None)  # pyright: ignore[reportArgumentType]  # the engine here does not sample


def text(job: Job) -> str:
    return job.take()[0]


def nothing() -> None:
    pass


def wait_for(done: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def make() -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def build(engine: Counting, slots: int = 2, queue: int = 2) -> Scheduler:
        scheduler = Scheduler(engine, slots=slots, queue=queue)
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield build
    for scheduler in made:
        scheduler.stop()
        assert not scheduler.alive


def begun(scheduler: Scheduler, *tokens: int, most: int = 5) -> list[Job]:
    jobs = []
    for token in tokens:
        job = scheduler.admit(nothing)
        job.begin(work(token, most))
        jobs.append(job)
    return jobs


def test_a_job_gets_its_whole_text(make: Callable[..., Scheduler]) -> None:
    engine = Counting()
    scheduler = make(engine)
    (job,) = begun(scheduler, 7)
    wait_for(lambda: job.ended)
    assert text(job) == "1 2 3 4 5 " and text(job) == ""
    finished = job.finished
    assert finished is not None
    assert (finished.reason, finished.prompt_tokens, finished.completion_tokens) == ("length", 1, 5)
    assert (scheduler.active, scheduler.waiting, engine.open) == (0, 0, 0)


def test_active_jobs_take_turns_and_the_queue_is_first_in_first_out(make: Callable[..., Scheduler]) -> None:
    gate = threading.Semaphore(0)
    engine = Counting(gate)
    scheduler = make(engine, slots=2, queue=2)
    jobs = begun(scheduler, 1, 2, 3, 4, most=3)
    wait_for(lambda: scheduler.active == 2)
    assert scheduler.waiting == 2
    gate.release(100)
    wait_for(lambda: all(job.ended for job in jobs))
    # The first may have had a step or two before the second came.
    assert sorted(engine.steps[:6]) == [1, 1, 1, 2, 2, 2]
    assert sorted(engine.steps[6:]) == [3, 3, 3, 4, 4, 4]
    assert engine.steps.index(3) < engine.steps.index(4)
    assert [text(job) for job in jobs] == ["1 2 3 "] * 4


def test_beyond_the_queue_is_refused(make: Callable[..., Scheduler]) -> None:
    gate = threading.Semaphore(0)
    scheduler = make(Counting(gate), slots=2, queue=2)
    preparing = scheduler.admit(nothing)  # counts, although its prompt is still being tokenised
    jobs = begun(scheduler, 1, 2, 3)
    assert scheduler.full
    with pytest.raises(Busy) as refused:
        scheduler.admit(nothing)
    assert 1 <= refused.value.retry_seconds <= 60
    preparing.cancel()
    preparing.cancel()
    (late,) = begun(scheduler, 4)
    gate.release(100)
    wait_for(lambda: all(job.ended for job in (*jobs, late)))
    assert not scheduler.full and scheduler.waiting == 0


def test_cancelled_jobs_give_their_place_back_in_every_state(make: Callable[..., Scheduler]) -> None:
    gate = threading.Semaphore(0)
    engine = Counting(gate)
    scheduler = make(engine, slots=1, queue=3)
    active, queued, last = begun(scheduler, 1, 2, 3)
    preparing = scheduler.admit(nothing)
    wait_for(lambda: scheduler.active == 1)
    queued.cancel()
    preparing.cancel()
    assert scheduler.waiting == 1
    active.cancel()
    gate.release(100)
    wait_for(lambda: last.ended)
    assert last.finished is not None and queued.finished is None and active.finished is None
    assert 2 not in engine.steps and engine.steps.count(1) <= 1
    assert (scheduler.active, scheduler.waiting, engine.open) == (0, 0, 0)
    last.cancel()  # after the end it means nothing
    assert scheduler.waiting == 0


def test_one_failure_ends_one_job(make: Callable[..., Scheduler]) -> None:
    engine = Counting()
    scheduler = make(engine)
    jobs = begun(scheduler, -3, 5)
    wait_for(lambda: all(job.ended for job in jobs))
    assert isinstance(jobs[0].error, RuntimeError) and text(jobs[0]) == "1 2 "
    assert jobs[1].error is None and text(jobs[1]) == "1 2 3 4 5 "
    assert scheduler.alive and engine.open == 0


def test_a_wake_that_fails_harms_nobody(make: Callable[..., Scheduler]) -> None:
    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    scheduler = make(Counting())
    job = scheduler.admit(gone)
    job.begin(work(1))
    wait_for(lambda: job.ended)
    assert job.error is None and scheduler.alive


def test_stop_ends_everything(make: Callable[..., Scheduler]) -> None:
    gate = threading.Semaphore(0)
    engine = Counting(gate)
    scheduler = make(engine, slots=1, queue=2)
    jobs = begun(scheduler, 1, 2)
    preparing = scheduler.admit(nothing)
    wait_for(lambda: scheduler.active == 1)
    gate.release(1)
    stopper = threading.Thread(target=scheduler.stop)
    stopper.start()
    gate.release(100)
    stopper.join(10)
    assert not scheduler.alive and engine.open == 0
    assert all(isinstance(job.error, Stopped) for job in jobs)
    with pytest.raises(Stopped):
        preparing.begin(work(3))
    preparing.cancel()
    with pytest.raises(Stopped):
        scheduler.admit(nothing)
    assert (scheduler.active, scheduler.waiting) == (0, 0)


def test_retry_after_follows_the_recent_speed(make: Callable[..., Scheduler]) -> None:
    scheduler = make(Counting(), slots=1, queue=100)
    for _ in range(40):
        (job,) = begun(scheduler, 1, most=1)
        wait_for(lambda job=job: job.ended)
    assert scheduler.retry_seconds() == 1


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_after_random_cancels(make: Callable[..., Scheduler], seed: int) -> None:
    draw = random.Random(seed)
    engine = Counting()
    scheduler = make(engine, slots=3, queue=5)
    refused = 0

    def client(number: int) -> None:
        nonlocal refused
        own = random.Random(seed * 100 + number)
        for _ in range(40):
            try:
                job = scheduler.admit(nothing)
            except Busy:
                refused += 1
                time.sleep(0.0005)
                continue
            if own.random() < 0.8:
                job.begin(work(number + 1, own.randrange(1, 30)))
                if own.random() < 0.5:
                    time.sleep(own.random() * 0.002)
            if own.random() < 0.7:
                job.cancel()
            else:
                wait_for(lambda job=job: job.ended or job.work is None)
                job.cancel()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(draw.randrange(8, 16))]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(30)
    wait_for(lambda: scheduler.active == 0)
    assert (scheduler.waiting, engine.open) == (0, 0)
    (job,) = begun(scheduler, 1)
    wait_for(lambda: job.ended)
    assert job.finished is not None
