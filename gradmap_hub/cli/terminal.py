"""Progress on stderr: one line per finished stage, and on a terminal a live bar while a stage runs."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TransferSpeedColumn,
)
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from gradmap_hub.units import printable


class TokenSpeed(ProgressColumn):
    """Tokens per second of a task whose steps are tokens."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")


class TerminalReporter:
    """A `Reporter` that prints to a console. As a context manager, it removes its live bar at the end.

    `quiet`: print nothing. Errors are printed by the caller.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live: Progress | None = None
        self._task = None
        self._title = ""
        self._started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, title: str) -> None:
        self.close()
        self._title = printable(title)
        self._started = time.monotonic()
        if self._quiet or not self._console.is_terminal:
            return
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Elapsed(),
            Remaining(),
            console=self._console,
            transient=True,
        )
        self._task = self._live.add_task(escape(self._title), total=None)
        self._live.start()

    def total(self, steps: int, *, unit: str = "") -> None:
        if self._live is not None and self._task is not None:
            if unit == "bytes":
                self._live.columns = (*self._live.columns[:3], DownloadColumn(), TransferSpeedColumn(), Remaining())
            if unit == "tokens":
                self._live.columns = (*self._live.columns, TokenSpeed())
            self._live.reset(self._task, total=steps)

    def advance(self, steps: int = 1) -> None:
        if self._live is not None and self._task is not None:
            self._live.advance(self._task, steps)

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        self.close()
        if self._quiet:
            return
        seconds = "on disk" if reused else f"{time.monotonic() - self._started:.1f} s"
        middle = f"  {escape(printable(note))}" if note else ""
        self._console.print(f"[green]done[/]  {escape(self._title)}[dim]{middle}  ({seconds})[/]", highlight=False)

    def note(self, text: str) -> None:
        # A live bar stays: the console prints above it.
        if not self._quiet:
            self._console.print(f"[yellow]note[/]  {escape(printable(text))}", highlight=False)

    def close(self) -> None:
        """Remove the live bar from the screen, if any."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._task = None
