"""What the command line draws on stderr: one line per finished stage, a live bar while one runs on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TransferSpeedColumn,
)
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

if TYPE_CHECKING:
    from gradmap_hub.pruning.scoring import LayerScores


class TerminalReporter:
    """Stages on stderr. `quiet` keeps to silence (errors are still shown by the caller)."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live: Progress | None = None
        self._task = None
        self._title = ""
        self._started = 0.0

    def start(self, title: str) -> None:
        self.close()
        self._title = title
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
        self._task = self._live.add_task(escape(title), total=None)
        self._live.start()

    def total(self, steps: int, *, unit: str = "") -> None:
        if self._live is not None and self._task is not None:
            if unit == "bytes":
                self._live.columns = (*self._live.columns[:3], DownloadColumn(), TransferSpeedColumn(), Remaining())
            self._live.reset(self._task, total=steps)

    def advance(self, steps: int = 1) -> None:
        if self._live is not None and self._task is not None:
            self._live.advance(self._task, steps)

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        self.close()
        if self._quiet:
            return
        seconds = "on disk" if reused else f"{time.monotonic() - self._started:.1f} s"
        middle = f"  {escape(note)}" if note else ""
        self._console.print(f"[green]done[/]  {escape(self._title)}[dim]{middle}  ({seconds})[/]", highlight=False)

    def note(self, text: str) -> None:
        # A live bar stays: the console prints above it.
        if not self._quiet:
            self._console.print(f"[yellow]note[/]  {escape(text)}", highlight=False)

    def close(self) -> None:
        """Take the live bar off the screen, if there is one."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._task = None


def inspect_table(model: str, scores: LayerScores, choices: Mapping[str, Sequence[int]]) -> Table:
    """One row per layer: its scores, and under which of `choices` (label such as "10%" -> layers) it would go."""
    table = Table(title=escape(model), title_justify="left")
    for name in ("layer", "gradient L1", "|W dL/dW|", "block influence"):
        table.add_column(name, justify="right")
    if choices:
        table.add_column("goes at")
    for layer, gradient, taylor, influence in zip(
        scores.layers, scores.gradient, scores.taylor, scores.influence, strict=True
    ):
        row = [str(layer), f"{gradient:.4g}", f"{taylor:.4g}", f"{influence:.4f}"]
        if choices:
            row.append(escape(", ".join(label for label, going in choices.items() if layer in going)))
        table.add_row(*row)
    return table
