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
    """Initialise the process group, if several processes were started. Its timeout allows for the hours in which the
    main process works alone."""
    global _joined
    if _launched():
        from datetime import timedelta

        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=_PATIENCE_DAYS))
        _joined = True


def leave() -> None:
    """Wait for all processes and end their joint work; the main process continues alone."""
    global _joined
    wait()
    _joined = False


def wait() -> None:
    """Wait until all joined processes have reached this call."""
    if _joined:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def check_alone() -> None:
    """Check that this process is the only one, or has joined the others.

    Raises:
        UsageError: several processes were started and have not joined: each would do the same work in the same folder.
    """
    if _launched() and not _joined:
        raise UsageError(
            "This command runs in one process, but several were started.",
            hint="Run it without `accelerate launch` or `torchrun`; only `gradmap-hub heal` uses several.",
        )


def main_first(compute: Callable[[], T]) -> T:
    """Call `compute` in the main process, then in the others, which read the files that it wrote; return the result."""
    if not is_main():
        wait()
        return compute()
    result = compute()
    wait()
    return result
