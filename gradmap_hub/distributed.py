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
_joined = False


def is_main() -> bool:
    """Whether this process is the main one, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Meet the other processes, if there are any, with a patience for what the main one does alone."""
    global _joined
    if _launched():
        from datetime import timedelta

        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=_PATIENCE_DAYS))
        _joined = True


def leave() -> None:
    """End the work together: the main process goes on alone."""
    global _joined
    wait()
    _joined = False


def wait() -> None:
    """Wait until all processes are here."""
    if _joined:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def check_alone() -> None:
    """
    Raises:
        UsageError: several processes were started and have not joined: each would do the same work in the same folder.
    """
    if _launched() and not _joined:
        raise UsageError(
            "This command runs in one process, but several were started.",
            hint="Run it without `accelerate launch` or `torchrun`; only `gradmap-hub heal` uses several.",
        )


def main_first(compute: Callable[[], T]) -> T:
    """The result of `compute` in each process; the main one computes first and leaves on disk what the others read."""
    if not is_main():
        wait()
        return compute()
    result = compute()
    wait()
    return result
