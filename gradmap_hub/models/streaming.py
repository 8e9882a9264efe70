"""Prune a model of any depth with a few layers in memory: weights stay memory-mapped on disk and are read by layer.

A `StreamedDecoder` is a `Decoder` whose model has its layers on the meta device. Entering `layer(index)` puts that
layer's weights in place, leaving it removes them. A weight used in the dtype it is stored in is not copied: it is a
view of the page cache. In another dtype, a layer is converted while it is in use; the embedding and the head, which
every pass uses, are converted piece by piece (`converting`). `pruning.writing` writes the pruned checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.models.architectures import ARCHITECTURES, Architecture
from gradmap_hub.models.converting import ConvertingEmbedding, ConvertingHead, must_be_whole
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.models.skeleton import empty_model, named_tensors, transformers_config
from gradmap_hub.models.weight_files import WeightFiles

# Bytes for the residual streams between all layers of the sequences that pass through the layers together.
STREAM_BUDGET = 1 << 30


@dataclass(frozen=True, eq=False)
class _Slot:
    """One parameter of a layer: its name within the layer and in the checkpoint, and the module it belongs to."""

    name: str
    tensor: str
    owner: nn.Module
    attribute: str
    empty: nn.Parameter


class StreamedDecoder(Decoder):
    """A decoder whose layers are fetched from disk when used. Made by `open_streamed`.

    A layer's parameters exist inside `layer(index)` only; outside, the module has parameters on the meta device.
    `put` and `replaced` are remembered and applied whenever the layer is fetched.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        tokens: int,
        files: WeightFiles,
        dtype: torch.dtype,
        rounding: torch.dtype | None,
    ) -> None:
        self.files = files
        self.dtype = dtype
        self._rounding = rounding
        self._depth: dict[int, int] = {}
        self._overrides: dict[tuple[int, str], Tensor] = {}
        layers: nn.ModuleList = model.get_submodule(architecture.layers)  # pyright: ignore
        self._slots = [_slots(layer, f"{architecture.layers}.{index}.") for index, layer in enumerate(layers)]
        super().__init__(model, architecture, tokens)

    @property
    def rows_per_pass(self) -> int:
        """The number of sequences whose residual streams between all layers fit in STREAM_BUDGET; at least 1."""
        width: int = self.model.config.hidden_size  # pyright: ignore
        row = (self.count + 1) * self.tokens * width * self.dtype.itemsize
        return max(1, STREAM_BUDGET // row)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The module of one layer, with its weights until the outermost of nested contexts ends."""
        depth = self._depth.get(index, 0)
        self._depth[index] = depth + 1
        try:
            if not depth:
                for slot in self._slots[index]:
                    _assign(slot, nn.Parameter(self.parameter(index, slot.name), requires_grad=False))
            yield self.layers[index]
        finally:
            self._depth[index] = depth
            if not depth:
                for slot in self._slots[index]:
                    _assign(slot, slot.empty)
                self.files.release(slot.tensor for slot in self._slots[index])

    def parameter(self, index: int, name: str) -> Tensor:
        """The current value of a layer's parameter in the decoder's dtype. It may be read-only."""
        slot = self._slot(index, name)
        if (index, name) in self._overrides:
            return self._overrides[index, name]
        return self._converted(self.files.tensor(slot.tensor))

    def put(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Set parameters of a layer for the lifetime of this decoder. The files are unchanged."""
        for name, value in values.items():
            slot = self._slot(index, name)
            if value.shape != slot.empty.shape:
                raise ValueError(f"{slot.tensor} has shape {tuple(slot.empty.shape)}; got {tuple(value.shape)}")
            self._overrides[index, name] = self._converted(value.detach())
        self._refresh(index, values)

    @contextmanager
    def replaced(self, index: int, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters of a layer inside the context. `values`: name within the layer -> new value."""
        before = {name: self._overrides.get((index, name)) for name in values}
        try:
            self.put(index, values)
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    self._overrides.pop((index, name), None)
                else:
                    self._overrides[index, name] = value
            self._refresh(index, values)

    def step(self, hidden: Tensor, index: int) -> Tensor:
        """Hidden states after one layer, computed sequence by sequence to limit activation memory, with one fetch."""
        with self.layer(index) as module:
            return torch.cat([self._call(module, row, index) for row in hidden.split(1)])

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The model itself, callable as usual (also with a KV cache): each layer is fetched when it runs."""

        def fetched(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.layer(index):
                    return forward(*args, **kwargs)

            return run

        for index, layer in enumerate(self.layers):
            layer.forward = fetched(index, layer.forward)
        try:
            yield self.model
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own again

    def _slot(self, index: int, name: str) -> _Slot:
        for slot in self._slots[index]:
            if slot.name == name:
                return slot
        raise AttributeError(f"layer {index} has no parameter {name!r}")

    def _refresh(self, index: int, names: Iterable[str]) -> None:
        """Update the parameters of a layer that is in use."""
        if self._depth.get(index, 0):
            for name in names:
                slot = self._slot(index, name)
                slot.owner.get_parameter(slot.attribute).data = self.parameter(index, name)

    def _converted(self, value: Tensor) -> Tensor:
        return (value if self._rounding is None else value.to(self._rounding)).to(self.dtype)


def open_streamed(
    folder: Path,
    architecture: Architecture,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    rounding: torch.dtype | None = None,
) -> StreamedDecoder:
    """The checkpoint in `folder` as a decoder for sequences of `tokens` tokens, with its layers left on disk.

    `dtype`: of the computation; None: the stored one. `rounding`: first round all weights to this dtype, as a
    checkpoint in it would.

    Raises:
        BrokenCheckpointError: a tensor is missing or of the wrong shape.
    """
    config = transformers_config(folder)
    files = WeightFiles(folder)
    stored = files.dtype(next((name for name in files.names() if "embed" in name), files.names()[0]))
    dtype = dtype or stored
    model = empty_model(config, dtype)
    files.expect(architecture, named_tensors(model))
    missing, _, mismatched = files.compare(named_tensors(model))
    if missing or mismatched:
        kind, name = ("no tensor", missing[0]) if missing else ("a wrong shape for", mismatched[0])
        raise BrokenCheckpointError(f"The checkpoint in {folder} has {kind} {name}.")
    _load_outside(model, architecture, files, dtype, rounding)
    return StreamedDecoder(model, architecture, tokens, files, dtype, rounding)


def key_report(folder: Path) -> dict[str, list[str]]:
    """The checkpoint's tensors compared with its config, in the form of transformers' loading report.

    The files are also opened with safetensors, so that a header that only our reader accepts does not pass.
    """
    from safetensors import safe_open

    model = empty_model(transformers_config(folder), torch.float32)
    files = WeightFiles(folder)
    files.expect(ARCHITECTURES[model.config.model_type], named_tensors(model))
    missing, unexpected, mismatched = files.compare(named_tensors(model))
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                opened.get_slice(name).get_shape()
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def pruned_logits(decoder: Decoder, kept: Sequence[int], ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) float32 of one sequence `ids` (1, tokens) with only the layers `kept` active."""
    with torch.no_grad():
        hidden = decoder.run(decoder.embed(ids), kept)
        return decoder.head(decoder.norm(hidden))[0].float()


def _load_outside(
    model: Any, architecture: Architecture, files: WeightFiles, dtype: torch.dtype, rounding: torch.dtype | None
) -> None:
    """Load the weights of the embedding, the final norm and the head; tie the head if the config says so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    for name, empty in list(model.named_parameters()):
        if name.startswith(f"{architecture.layers}."):
            continue
        owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
        if tied and owner is head and name.endswith(".weight"):
            continue
        value = files.tensor(name)
        value = value if rounding is None else value.to(rounding)
        # These two are large and are converted as they are used.
        if owner not in (embedding, head) or must_be_whole(owner):
            value = value.to(dtype)
        _assign(_Slot(name, name, owner, name.rpartition(".")[2], empty), nn.Parameter(value, requires_grad=False))
    if tied:
        head.weight = embedding.weight
    if embedding.weight.dtype != dtype:
        model.set_input_embeddings(ConvertingEmbedding(embedding.weight, dtype))
    if head.weight.dtype != dtype:
        model.set_output_embeddings(ConvertingHead(head.weight))


def _slots(layer: nn.Module, prefix: str) -> list[_Slot]:
    result = []
    for name, parameter in layer.named_parameters():
        owner, _, attribute = name.rpartition(".")
        result.append(_Slot(name, prefix + name, layer.get_submodule(owner), attribute, parameter))
    return result


def _assign(slot: _Slot, parameter: nn.Parameter) -> None:
    # Not setattr, which runs registration hooks: the module must hold this very object.
    slot.owner._parameters[slot.attribute] = parameter
