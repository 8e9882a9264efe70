"""The current jobs, so that Stop, a closed page or shutdown can end them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from generation import Settings


@dataclass
class Job:
    """One click on Compare, or one API call."""

    prompt: str
    settings: Settings
    precision: str
    blind: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    started: bool = False


class Jobs:
    """At most one job per session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def add(self, session: str, job: Job) -> bool:
        """Add a job; False if the session already has one, as after a double click."""
        with self._lock:
            if session in self._jobs:
                return False
            self._jobs[session] = job
            return True

    def take(self, session: str) -> Job | None:
        """Mark the job of a session as started and return it; None if there is no waiting job."""
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
        """Stop a running job. Remove a waiting job and return False: it will send no update."""
        with self._lock:
            job = self._jobs.get(session)
            if job is not None and not job.started:
                del self._jobs[session]
                return False
        if job is not None:
            job.stop.set()
        return True

    def leave(self, session: str) -> None:
        """Handle a closed page: stop a running job and remove it; remove a waiting one."""
        with self._lock:
            job = self._jobs.pop(session, None)
        if job is not None:
            job.stop.set()

    def stop_all(self) -> None:
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()

    def counts(self) -> tuple[int, int]:
        """The number of running jobs (at most one) and of waiting jobs."""
        with self._lock:
            running = sum(job.started for job in self._jobs.values())
            return running, len(self._jobs) - running

    def busy(self, seconds: float) -> bool:
        """Wait up to `seconds` for started jobs to end; whether any is still running."""
        until = time.monotonic() + seconds
        while any(job.started for job in list(self._jobs.values())):
            if time.monotonic() > until:
                return True
            time.sleep(0.05)
        return False
