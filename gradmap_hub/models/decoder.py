"""Run any subset of a model's decoder layers, from any hidden state, without changing the model.

Scoring, selection, compensation and evaluation all need the residual stream after some layers, and its loss. Each
layer is called exactly as the model itself calls it: its keyword arguments (rotary embeddings, attention mask,
positions) are captured once per sequence length and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from gradmap_hub.errors import UsageError
from gradmap_hub.models.architectures import Architecture

# Positions whose logits exist at once: with a large vocabulary, logits are the largest tensor of a forward pass.
LOGIT_CHUNK = 256


class _Captured(Exception):
    """Aborts a forward pass once the hidden states before the first layer are known."""


class Decoder:
    """A causal LM as embedding -> layers -> final norm -> head, for sequences of exactly `tokens` tokens.

    Shapes: ids (batch, tokens) int64; hidden states (batch, tokens, d); layer indices are those of `model`. Sequences
    have no padding, so the captured attention arguments hold for all of them.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, tokens: int) -> None:
        self.model = model
        self.architecture = architecture
        self.tokens = tokens
        self.layers: nn.ModuleList = model.get_submodule(architecture.layers)  # pyright: ignore
        self.norm: nn.Module = _final_norm(model, architecture)
        self.output: nn.Module = model.get_output_embeddings()  # pyright: ignore
        self.head = self.head_of(self.output)
        self.device: torch.device = self.output.weight.device  # pyright: ignore
        # Off even if the config sets them: recording outputs patches the layers until a pass ends, but ours abort.
        self._quiet = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}
        if hasattr(model.config, "output_router_logits"):
            self._quiet["output_router_logits"] = False
        self._arguments = self._capture_arguments()

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the head's weight."""
        return self.output.weight.dtype  # pyright: ignore

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.output.weight.shape[0])  # pyright: ignore

    @property
    def rows_per_pass(self) -> int:
        """Sequences to carry through the layers together: 1 if the layers are in memory (least activation memory), more
        if fetching a layer is expensive."""
        return 1

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The module of one layer. Its weights are in memory inside the context."""
        yield self.layers[index]

    def mlp_output(self, index: int) -> nn.Linear:
        """The down projection of a layer: (tokens, d_ff) -> (tokens, d)."""
        return self.layers[index].get_submodule(self.architecture.mlp_output)  # pyright: ignore

    def put(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Set parameters of a layer permanently. `values`: name within the layer -> new value."""
        for name, value in values.items():
            self.layers[index].get_parameter(name).data = value.to(self.device)

    def head_of(self, output: nn.Module) -> Callable[[Tensor], Tensor]:
        """The function from normed hidden states to logits for an output embedding of this family and config."""
        return _head(output, self.architecture, self.model.config)

    @contextmanager
    def replaced(self, index: int, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters of a layer inside the context. `values`: name within the layer -> new value."""
        with parameters_replaced(self.layers[index], values):
            yield

    def _capture_arguments(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of each layer besides the hidden states. The layers are stubs that return their input; the last
        one aborts the pass."""
        captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hand_on(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            captured.append((args, kwargs))
            if len(captured) == len(self.layers):
                raise _Captured
            # Some models take the hidden states out of a tuple, others pass the layer's output on unchanged.
            return hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)

        for layer in self.layers:
            layer.forward = hand_on
        try:
            with torch.no_grad():
                ids = torch.zeros(1, self.tokens, dtype=torch.long, device=self.device)
                self.model(input_ids=ids, **self._quiet)
        except _Captured:
            pass
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own again
        return captured

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states (batch, tokens, d) before the first layer, with the family's scaling of embeddings."""
        result: list[Tensor] = []

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            result.append(args[0] if args else kwargs["hidden_states"])
            raise _Captured

        handle = self.layers[0].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(input_ids=ids.to(self.device), **self._quiet)
        except _Captured:
            pass
        finally:
            handle.remove()
        return result[0]

    def step(self, hidden: Tensor, index: int) -> Tensor:
        """Hidden states after one layer."""
        with self.layer(index) as module:
            return self._call(module, hidden, index)

    def _call(self, module: nn.Module, hidden: Tensor, index: int) -> Tensor:
        args, kwargs = self._arguments[index]
        output = module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Exclude all parameters from autograd inside the context, except in `backward`."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def backward(
        self, hidden: Tensor, index: int, gradient: Tensor, reduce: Callable[[str, nn.Parameter], None] | None = None
    ) -> Tensor:
        """One layer's backward pass, with its activations recomputed from its input.

        `hidden`: the layer's input; `gradient`: dL/d(output); both (batch, tokens, d). `reduce(name, matrix)` is called
        for each weight matrix once `matrix.grad` exists, which is freed right after, so that only one gradient is alive
        at a time; None: no gradients of weights are computed, which saves a third of the matrix products. Norm gains
        and biases are excluded: they are few and scaled differently. Returns dL/d(input).
        """
        with self.layer(index) as module, torch.enable_grad():
            handles = []
            matrices = [
                (name, parameter)
                for name, parameter in module.named_parameters()
                if reduce is not None and is_matrix(name, parameter)
            ]
            for name, parameter in matrices:
                assert reduce is not None
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(partial(_reduce_and_free, reduce, name)))
            try:
                inputs = hidden.detach().requires_grad_(True)
                self._call(module, inputs, index).backward(gradient)
            finally:
                for handle in handles:
                    handle.remove()
                for _, parameter in matrices:
                    parameter.requires_grad_(False)
                    parameter.grad = None
            assert inputs.grad is not None
            return inputs.grad

    def run(self, hidden: Tensor, layers: Sequence[int], seen: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Hidden states after `layers` in order; `seen(layer, hidden)` is called after each."""
        for layer in layers:
            hidden = self.step(hidden, layer)
            if seen is not None:
                seen(layer, hidden)
        return hidden

    def carry(self, states: list[Tensor], layers: Iterable[int]) -> None:
        """Run `layers` on many sequences, in place: each layer is fetched once for all of them."""
        with torch.no_grad():
            for layer in layers:
                with self.layer(layer):
                    for index, hidden in enumerate(states):
                        states[index] = self.step(hidden, layer)

    def row_losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token negative log-likelihood of each sequence, in nats: (batch,) float32.

        `hidden` is the residual stream after the last layer; logits are computed in chunks of positions.
        """
        total = torch.zeros(len(ids), device=self.device)
        for start, wanted in self._chunks(ids):
            logits = self.head(self.norm(hidden[:, start : start + wanted.shape[1]]))
            total += _exponentiated(logits.detach(), wanted)[0].sum(dim=1)
        return total / (ids.shape[1] - 1)

    def losses(
        self, ids: Tensor, layers: Sequence[int] | None = None, rows_done: Callable[[int], None] = lambda _rows: None
    ) -> list[float]:
        """Mean NLL (nats per token) of each sequence of `ids` (n, tokens) with only `layers` active (default: all)."""
        return self.losses_of(ids, [range(self.count) if layers is None else layers], rows_done)[0]

    def losses_of(
        self, ids: Tensor, sets: Sequence[Sequence[int]], rows_done: Callable[[int], None] = lambda _rows: None
    ) -> list[list[float]]:
        """`losses` for each of several sets of active layers; the first layers that all sets share run once."""
        start = sum(1 for _ in takewhile(lambda layers: len(set(layers)) == 1, zip(*sets, strict=False)))
        found: list[list[float]] = [[] for _ in sets]
        for group in ids.split(self.rows_per_pass):
            rows = group.split(1)
            common = [self.embed(row) for row in rows]
            self.carry(common, sets[0][:start])
            for active, losses in zip(sets, found, strict=True):
                states = list(common)
                self.carry(states, active[start:])
                with torch.no_grad():
                    losses += [float(self.row_losses(last, row)) for last, row in zip(states, rows, strict=True)]
                rows_done(len(rows))
        return found

    def loss_gradient(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`row_losses` and the gradient of their sum with respect to `hidden`, (batch, tokens, d).

        Each chunk of logits is turned into its gradient in place (softmax - one-hot) and freed before the next.
        """
        inputs = hidden.detach().requires_grad_(True)
        total = torch.zeros(len(ids), device=self.device)
        count = ids.shape[1] - 1
        for start, wanted in self._chunks(ids):
            with torch.enable_grad():
                logits = self.head(self.norm(inputs[:, start : start + wanted.shape[1]]))
            losses, exponentials, sums = _exponentiated(logits.detach(), wanted)
            total += losses.sum(dim=1) / count
            exponentials /= sums
            ones = torch.full_like(wanted, -1, dtype=exponentials.dtype).unsqueeze(-1)
            exponentials.scatter_add_(-1, wanted.unsqueeze(-1), ones)
            exponentials /= count
            logits.backward(exponentials.to(logits.dtype))
        assert inputs.grad is not None
        return total, inputs.grad

    def _chunks(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Start and targets (batch, chunk) of each chunk of predicting positions."""
        targets = ids[:, 1:].to(self.device)
        for start in range(0, targets.shape[1], LOGIT_CHUNK):
            yield start, targets[:, start : start + LOGIT_CHUNK]


def _exponentiated(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses (batch, chunk) in nats, exp(logits - max) float32 and their sums (batch, chunk, 1).

    In place if the logits are float32: they are the largest tensor of a pass, and a copy costs more than the
    arithmetic.
    """
    shifted = logits.float()
    shifted -= shifted.amax(dim=-1, keepdim=True)
    wanted = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    exponentials = shifted.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    return sums.log().squeeze(-1) - wanted, exponentials, sums


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a layer is a weight matrix or a stack of them for experts, and not a stack of biases."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def _final_norm(model: nn.Module, architecture: Architecture) -> nn.Module:
    """The modules between the last layer and the head; some models of a family lack one of them."""
    parts = [_submodule(model, path) for path in (architecture.final_norm, architecture.after_norm) if path is not None]
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else nn.Sequential(*present)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def _head(output: nn.Module, architecture: Architecture, config: Any) -> Callable[[Tensor], Tensor]:
    """The function from normed hidden states to logits, with the family's scaling and capping."""
    names = (architecture.logit_multiplier, architecture.logit_divisor, architecture.logit_cap)
    multiplier, divisor, cap = (getattr(config, name) if name is not None else None for name in names)
    if multiplier is divisor is cap is None:
        return output

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        if multiplier is not None:
            logits = logits * multiplier
        if divisor is not None:
            logits = logits / divisor
        # Scaled last, as in the models: callers may overwrite the product, but autograd needs the output of tanh.
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def _reduce_and_free(reduce: Callable[[str, nn.Parameter], None], name: str, parameter: nn.Parameter) -> None:
    reduce(name, parameter)
    parameter.grad = None


@contextmanager
def parameters_replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters of a module, by name, inside the context."""
    originals = {name: module.get_parameter(name).data for name in values}
    try:
        for name, value in values.items():
            module.get_parameter(name).data = value
        yield
    finally:
        for name, value in originals.items():
            module.get_parameter(name).data = value


def choose_precision(compute: str, device: str, stored: str, *, streamed: bool) -> tuple[torch.dtype, str]:
    """Dtype and device ("cpu", "cuda") of a computation. bfloat16 is only for weights stored in it: others would be
    rounded, also in the written checkpoint.

    Args:
        compute, device: The options of `PruneConfig`.
        stored: Dtype of the stored weights, such as "bfloat16".
        streamed: The weights are streamed from disk, which runs on the CPU.

    Raises:
        UsageError: the device is missing, or bfloat16 is requested for weights of another dtype.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError("--device cuda: PyTorch finds no CUDA device. Use --device cpu.")
    chosen = "cuda" if cuda and device != "cpu" and not streamed else "cpu"
    if compute == "bfloat16" and stored != "bfloat16":
        raise UsageError(
            f"--compute bfloat16 would round these weights, which are stored in {stored}; use --compute float32."
        )
    half = compute == "bfloat16" or (compute == "auto" and stored == "bfloat16" and fast_bfloat16(chosen))
    return (torch.bfloat16 if half else torch.float32), chosen


def fast_bfloat16(device: str) -> bool:
    """Whether a device ("cpu", "cuda") multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
