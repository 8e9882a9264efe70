"""The context of a run: original, method, output folder, and the cache of finished stages."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import Expected, PruneMethod
from gradmap_hub.errors import OutputInUse
from gradmap_hub.files import lock
from gradmap_hub.layout import work_folder
from gradmap_hub.models.original import TRANSLATED, OriginalModel, open_decoder
from gradmap_hub.models.source import Source, identity
from gradmap_hub.progress import Reporter
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    import torch

    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.decoder import Decoder


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Keep other processes from working on the folder `output`.

    Raises:
        OutputInUse: another process works on it.
    """
    work = work_folder(output)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "lock"
    try:
        held = lock(file)
    except BlockingIOError:
        raise OutputInUse(str(output)) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot delete an open file; an unlocked file left behind is harmless
            file.unlink()
        held.close()


@contextmanager
def no_empty_folders(output: Path) -> Iterator[None]:
    """Remove the folders of a run that fails before it writes any result."""
    work = work_folder(output)
    created = [folder for folder in (work, output, *output.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if work in created:
            shutil.rmtree(work / TRANSLATED, ignore_errors=True)  # no result: a resumed run writes it again
        for folder in created:
            with suppress(OSError):
                folder.rmdir()  # fails unless it is empty
        raise


class Run:
    """The state that the stages of `prune`, `heal`, `inspect` and `sweep` share.

    Args:
        source: The original.
        method: How to prune.
        output: The folder of the result; the work folder is next to it.
        hub: For downloads.
        reporter: Receives the stages.
        command: The command line, for the record.
        kind: The command; cached stages of another command are not reused.
        expected: Commit and checksums of an earlier run that must match.
        of: A further input of all stages, as JSON data; cached stages with another one are not reused.
    """

    def __init__(
        self,
        source: Source,
        method: PruneMethod,
        output: Path,
        hub: Hub,
        reporter: Reporter,
        *,
        command: str = "",
        kind: str = "prune",
        expected: Expected | None = None,
        of: Any = None,
    ) -> None:
        self.source = source
        self.method = method
        self.output = output
        self.work = work_folder(output)
        self.hub = hub
        self.reporter = reporter
        self.command = command
        self.expected = expected or Expected()
        self.original = OriginalModel(source, hub, self.work, reporter.note)
        depends = {"version": __version__, "what": kind, "base": identity(source)}
        self.stages = Stages(self.work, reporter, depends if of is None else depends | {"of": of})
        # For stages that depend on no other, such as the original's text and predictions; shared by branches.
        self.shared, self.independent = self.work, self.stages.branch()
        self._opened: list[Decoder] = []  # at most one; shared with branches

    def branch(self, name: str, label: str) -> Run:
        """A copy of this run with its own stage results (see `Stages.branch`) and the same original."""
        other = copy.copy(self)
        other.stages = self.stages.branch(name, label)
        other.work = other.stages.folder
        return other

    def decoder(self) -> Decoder:
        """The original model, opened on first use."""
        if not self._opened:
            self._opened.append(self.open(self.original.checkpoint()))
        return self._opened[0]

    def open(self, folder: Path) -> Decoder:
        """Open a checkpoint of this family, in memory or streamed (--low-memory)."""
        dtype, device = self.precision()
        return open_decoder(
            folder, self.source.architecture, self.method.seq_len, dtype=dtype, device=device,
            streamed=self.method.low_memory,
        )  # fmt: skip

    def precision(self) -> tuple[torch.dtype, str]:
        """The dtype of the computation and its device.

        Raises:
            UsageError: the model or the machine does not support --compute or --device.
        """
        from gradmap_hub.models.decoder import choose_precision

        return choose_precision(
            self.method.compute, self.method.device, self.source.base.dtype, streamed=self.method.low_memory
        )

    def release(self) -> None:
        """Close the original to free its memory for the next stage."""
        self._opened.clear()
        gc.collect()
