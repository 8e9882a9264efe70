"""What an evaluation consists of: measurements, each with its steps and its result.

A step is the unit that is cached: it depends on the weights of some models and on its inputs, and on nothing else.
Steps that need the same model run one after another, so that one model at a time is in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gradmap_hub.folder_config import EvaluateConfig
from gradmap_hub.progress import Reporter

if TYPE_CHECKING:
    import torch

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.models.architectures import Architecture
    from gradmap_hub.models.decoder import Decoder

T = TypeVar("T")

ORIGINAL, PRUNED = "original", "pruned"


@dataclass(frozen=True)
class Step(Generic[T]):
    """The computation of one cached result.

    Attributes:
        name: Name of the result's file; unique within an evaluation.
        title: Shown while it is computed.
        kind: Dataclass of the result; it is stored as JSON.
        compute: Returns the result.
        weights: The models whose weights the result depends on.
        inputs: What else the result depends on, as JSON.
        loads: The model that `compute` opens (ORIGINAL or PRUNED); None: neither may be in memory.
        describe: Returns one line about the result.
        final: Whether later evaluations may reuse the result; one that is not final is computed again.
    """

    name: str
    title: str
    kind: type[T]
    compute: Callable[[], T]
    weights: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    loads: str | None = None
    describe: Callable[[T], str] = lambda _: ""
    final: Callable[[T], bool] = lambda _: True


@dataclass(frozen=True)
class Graph:
    """An ONNX file of the folder. `data_sha256`: of the weight file next to it, empty if it has none."""

    path: str
    bytes: int
    sha256: str
    data_sha256: str


class Models:
    """The two models, one of them in memory at a time. `tokens`: length of the sequences that decoders are opened for.

    Attributes:
        folders: ORIGINAL and PRUNED -> checkpoint folder.
        sha256: ORIGINAL and PRUNED -> checksum of the weights.
        dtype: Of the computation.
        device: Of the computation, "cpu" or "cuda".
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        sha256: Mapping[str, str],
        architecture: Architecture,
        tokens: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.folders = folders
        self.sha256 = sha256
        self.dtype = dtype
        self.device = device
        self._architecture = architecture
        self._tokens = tokens
        self._open: tuple[str, Decoder] | None = None

    def load(self, which: str) -> Any:
        """Load a model with transformers. Unlike in `decoder`, it is not cached, and the other model is not closed."""
        from gradmap_hub.models.checkpoint import load_model

        return load_model(self.folders[which], self.dtype)[0].to(self.device)

    def decoder(self, which: str) -> Decoder:
        """The decoder of one model; the other one is closed."""
        if self._open is None or self._open[0] != which:
            from gradmap_hub.models.decoder import Decoder

            self.close()
            self._open = which, Decoder(self.load(which), self._architecture, self._tokens)
        return self._open[1]

    def close(self) -> None:
        self._open = None
        gc.collect()


@dataclass(frozen=True)
class Context:
    """What every measurement may use.

    Attributes:
        folder: The pruned model; its ONNX files are `graphs`.
        models: The original and the pruned model.
        tokenizer: Of both models.
        texts: Sequences of each evaluation text.
        tasks: Names of the tasks.
        prompts: The prompts that both models answer greedily.
        config: The options of the command.
        reporter: Receives steps and notes.
        work: Folder for files that later steps need.
    """

    folder: Path
    graphs: Sequence[Graph]
    models: Models
    tokenizer: Any
    texts: Sequence[Rows]
    tasks: Sequence[str]
    prompts: Sequence[str]
    config: EvaluateConfig
    reporter: Reporter
    work: Path


@dataclass(frozen=True)
class Measurement:
    """A field of `Measured`.

    Attributes:
        name: Name of the field.
        steps: The steps for this context; none if it is not measured.
        result: Value of the field, from the results of all steps by name.
    """

    name: str
    steps: Callable[[Context], Sequence[Step[Any]]]
    result: Callable[[Context, Mapping[str, Any]], list[Any]]
