"""Run any subset of a model's decoder layers, from any hidden state, without touching the model.

Scoring, selection, compensation and evaluation all ask the same thing of a model: "the residual stream after these
layers", "the loss of that stream". Each layer is called exactly as the model itself calls it: its keyword arguments
(rotary embeddings, attention mask, positions) are captured once for a row length and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmap_hub.architectures import Architecture

# Positions whose logits exist at once: the logits of a large vocabulary are the biggest tensor of a forward pass.
LOGIT_CHUNK = 512


class _Captured(Exception):
    """Leaves a forward pass once the hidden states before the first layer are known."""


class Decoder:
    """A causal LM seen as embedding -> layers -> final norm -> head, for rows of one fixed length.

    Shapes: ids (batch, tokens) int64; hidden states (batch, tokens, d); layer indices are those of `model`.
    Rows are full (no padding), so the captured attention arguments hold for every row.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, tokens: int) -> None:
        self.model = model
        self.architecture = architecture
        self.tokens = tokens
        self.layers: nn.ModuleList = model.get_submodule(architecture.layers)  # pyright: ignore
        self.norm: nn.Module = model.get_submodule(architecture.final_norm)
        self.head: nn.Module = model.get_output_embeddings()  # pyright: ignore
        self.device = next(model.parameters()).device
        self._arguments = self._capture_arguments()

    @property
    def count(self) -> int:
        return len(self.layers)

    def mlp_output(self, layer: int) -> nn.Linear:
        """The down projection of `layer`: (tokens, d_ff) -> (tokens, d)."""
        return self.layers[layer].get_submodule(self.architecture.mlp_output)  # pyright: ignore

    def _capture_arguments(self) -> list[dict[str, Any]]:
        captured: list[dict[str, Any]] = []

        def remember(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self.model(
                    input_ids=torch.zeros(1, self.tokens, dtype=torch.long, device=self.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before the first layer, with whatever scaling the family applies."""
        result: list[Tensor] = []

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            result.append(args[0] if args else kwargs["hidden_states"])
            raise _Captured

        handle = self.layers[0].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            # Recording outputs patches the layers until the pass ends, and this one does not; a config may ask for it.
            self.model(
                input_ids=ids.to(self.device), use_cache=False, output_hidden_states=False, output_attentions=False
            )
        except _Captured:
            pass
        finally:
            handle.remove()
        return result[0]

    def step(self, hidden: Tensor, layer: int) -> Tensor:
        """Hidden states after one layer."""
        output = self.layers[layer](hidden, **self._arguments[layer])
        return output[0] if isinstance(output, tuple) else output

    def run(self, hidden: Tensor, layers: Sequence[int], seen: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Hidden states after `layers` in order; `seen(layer, hidden)` is called after each."""
        for layer in layers:
            hidden = self.step(hidden, layer)
            if seen is not None:
                seen(layer, hidden)
        return hidden

    def row_losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token negative log-likelihood of each row, in nats: (batch,) float32.

        `hidden` is the residual stream after the last layer; the logits are formed in chunks of positions.
        """
        normed = self.norm(hidden)[:, :-1]
        targets = ids[:, 1:].to(self.device)
        total = torch.zeros(len(ids), device=self.device)
        for start in range(0, targets.shape[1], LOGIT_CHUNK):
            logits = self.head(normed[:, start : start + LOGIT_CHUNK]).float()  # (batch, chunk, vocabulary)
            wanted = targets[:, start : start + LOGIT_CHUNK]
            losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            total = total + losses.view(wanted.shape).sum(dim=1)
        return total / targets.shape[1]


@contextmanager
def parameters_replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other values for some of a module's parameters for a while. The module is as before afterwards."""
    originals = {name: module.get_parameter(name).data for name in values}
    try:
        for name, value in values.items():
            module.get_parameter(name).data = value
        yield
    finally:
        for name, value in originals.items():
            module.get_parameter(name).data = value
