"""Progress of long work. The library calls a `Reporter`; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the stages of a run and the steps within them."""

    def start(self, title: str) -> None:
        """A stage begins."""
        ...

    def total(self, steps: int, *, unit: str = "") -> None:
        """The running stage has `steps` steps; `unit`: "bytes" or "tokens" if these are what it counts."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Another `steps` steps of the running stage are done."""
        ...

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        """The running stage is done; `reused` if its result was already on disk."""
        ...

    def note(self, text: str) -> None:
        """A line of information that is not a stage."""
        ...


class SilentReporter:
    """A `Reporter` that prints nothing; the default of the Python API."""

    def start(self, title: str) -> None: ...

    def total(self, steps: int, *, unit: str = "") -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self, note: str = "", *, reused: bool = False) -> None: ...

    def note(self, text: str) -> None: ...
