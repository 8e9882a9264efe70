"""The runs in progress, so that Stop, a closed page or the end of the program can end them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from generation import Settings


@dataclass
class Job:
    """One press on Compare, or one call of the API."""

    prompt: str
    settings: Settings
    precision: str
    blind: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    started: bool = False


class Jobs:
    """At most one job per visitor (session). Handlers run in several threads, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def add(self, session: str, job: Job) -> bool:
        """False if this visitor's last run has not ended, as after a double press."""
        with self._lock:
            if session in self._jobs:
                return False
            self._jobs[session] = job
            return True

    def take(self, session: str) -> Job | None:
        """The job to be run now, once."""
        with self._lock:
            job = self._jobs.get(session)
            if job is None or job.started:
                return None
            job.started = True
            return job

    def remove(self, session: str, job: Job) -> None:
        with self._lock:
            if self._jobs.get(session) is job:
                del self._jobs[session]

    def stop(self, session: str) -> bool:
        """End what runs; forget what only waited, and say so with False: nothing will be heard of it."""
        with self._lock:
            job = self._jobs.get(session)
            if job is not None and not job.started:
                del self._jobs[session]
                return False
        if job is not None:
            job.stop.set()
        return True

    def leave(self, session: str) -> None:
        """The page was closed: end what runs, and forget what only waited."""
        with self._lock:
            job = self._jobs.pop(session, None)
        if job is not None:
            job.stop.set()

    def stop_all(self) -> None:
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()

    def counts(self) -> tuple[int, int]:
        """How many run (never more than one), and how many visitors wait."""
        with self._lock:
            running = sum(job.started for job in self._jobs.values())
            return running, len(self._jobs) - running

    def busy(self, seconds: float) -> bool:
        """Whether jobs that have begun are still running after a wait."""
        until = time.monotonic() + seconds
        while any(job.started for job in list(self._jobs.values())):
            if time.monotonic() > until:
                return True
            time.sleep(0.05)
        return False
