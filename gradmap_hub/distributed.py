"""Several processes of one command, started by `accelerate launch` or `torchrun`: each computes its share of the
training, and the main one does everything else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from gradmap_hub.errors import UsageError

T = TypeVar("T")

# How long the others wait for the main process: it reads and writes text for hours where they have nothing to do.
_PATIENCE_DAYS = 7
_left = False


def is_main() -> bool:
    """Whether this process is the main one, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def several() -> bool:
    """Whether this process is one of several that work together."""
    return not _left and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave() -> None:
    """End the work together: the main process goes on alone."""
    global _left
    wait()
    _left = several()


def join() -> None:
    """Meet the other processes before any of them computes, with a patience for what the main one does alone."""
    if several():
        from datetime import timedelta

        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=_PATIENCE_DAYS))


def wait() -> None:
    """Wait until all processes are here."""
    if several():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def check_alone(command: str) -> None:
    """
    Raises:
        UsageError: the process is one of several, of which all but the training is the work of one.
    """
    if several():
        raise UsageError(
            f"{command} runs in one process.",
            hint="Run it without `accelerate launch` or `torchrun`; then launch `gradmap-hub heal` on the folder.",
        )


def main_first(compute: Callable[[], T]) -> T:
    """The result of `compute` in each process; the main one computes first and leaves on disk what the others read."""
    if not is_main():
        wait()
        return compute()
    result = compute()
    wait()
    return result
