"""Progress of long work. The library calls a `Reporter`; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the stages of a run and the steps within them."""

    def start(self, title: str) -> None:
        """A stage begins."""
        ...

    def total(self, steps: int, *, unit: str = "") -> None:
        """The running stage has this many steps; `unit` is "bytes" or "tokens" if the steps are such."""
        ...

    def advance(self, steps: int = 1) -> None:
        """This many further steps of the running stage are done."""
        ...

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        """The running stage is done; `reused` if its result was already on disk."""
        ...

    def note(self, text: str) -> None:
        """A line of information that is not a stage."""
        ...


class SilentReporter:
    """The default for library use."""

    def start(self, title: str) -> None: ...

    def total(self, steps: int, *, unit: str = "") -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self, note: str = "", *, reused: bool = False) -> None: ...

    def note(self, text: str) -> None: ...
