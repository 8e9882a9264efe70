"""The context of a run: its original, its method, where it writes, and the cache of its finished stages."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import __version__
from gradmap_hub.config import Expected, PruneMethod
from gradmap_hub.layout import work_folder
from gradmap_hub.models.original import OriginalModel, open_decoder
from gradmap_hub.models.source import Source, identity
from gradmap_hub.progress import Reporter
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    import torch

    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.decoder import Decoder


class Run:
    """What the stages of `prune`, `inspect` and `sweep` share.

    Args:
        output: The folder of the result; the work folder stands beside it.
        kind: Which command's results the cached stages are; those of another command are not reused.
        expected: What a run that repeats an earlier one must find again.
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
    ) -> None:
        self.source = source
        self.method = method
        self.output = output
        self.work = work_folder(output)
        self.hub = hub
        self.reporter = reporter
        self.command = command
        self.expected = expected or Expected()
        self.original = OriginalModel(source, hub, self.work)
        self.stages = Stages(self.work, reporter, {"version": __version__, "what": kind, "base": identity(source)})
        self._opened: list[Decoder] = []  # none or one; branches share it

    def branch(self, name: str, label: str) -> Run:
        """This run continued with results of its own (see `Stages.branch`) and the same original."""
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
        """A checkpoint of this family, opened as the method says: in memory, or streamed with --low-memory."""
        dtype, device = self.precision()
        return open_decoder(
            folder, self.source.architecture, self.method.seq_len, dtype=dtype, device=device,
            streamed=self.method.low_memory,
        )  # fmt: skip

    def precision(self) -> tuple[torch.dtype, str]:
        """The dtype of the computation and its device.

        Raises:
            UsageError: --compute or --device asks for what the model or the machine does not have.
        """
        from gradmap_hub.models.decoder import choose_precision

        return choose_precision(
            self.method.compute, self.method.device, self.source.base.dtype, streamed=self.method.low_memory
        )

    def release(self) -> None:
        """Close the original: the next stage needs the memory."""
        self._opened.clear()
        gc.collect()
