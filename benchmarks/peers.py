"""Reimplementations of the peer methods, each as its published code behaves, on a `Decoder` and sequences of token ids.

A selection `(decoder, ids, count) -> PeerSelection` returns the layers to remove; a compensation
`(decoder, ids, removed) -> Patch` returns the other changes. ids (rows, tokens) int64; x_i (tokens, d) is the residual
stream of one sequence entering layer i, x_L the output of the last layer; row vectors throughout. No code is copied
from the peers. Where a paper and its code disagree, this follows the code, and the docstring says so.

    ShortGPT        arXiv 2403.03853     selection
    SLEB            arXiv 2402.09025     selection
    Taylor+         arXiv 2402.02834     selection (Shortened LLaMA)
    LLM-Streamline  arXiv 2403.19135     selection (its variant without a trained network)
    ReplaceMe       arXiv 2505.02819     selection, compensation (folded into the weights before the gap)
    LinearPatch     arXiv 2505.24680     selection, compensation (a matrix at the cut: no stock checkpoint)
    Prune&Comp      arXiv 2507.18212     selection, compensation (folded into every weight before the cut)
    reverse order   arXiv 2411.15558     selection
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmap_hub.models.decoder import Decoder, parameters_replaced

# Besides the MLP output, the matrix that writes to the residual stream; it has this name in every supported family.
ATTENTION_OUTPUT = "self_attn.o_proj"


@dataclass(frozen=True)
class PeerSelection:
    """`removed` in ascending order; `order` in order of removal (or rank), if the method has one.

    `forward_equivalents`: forward passes of the whole model over the same sequences: layers run divided by the number
    of layers; one backward pass counts as two forward passes.
    """

    removed: list[int]
    order: list[int]
    forward_equivalents: float


@dataclass(frozen=True, eq=False)
class Patch:
    """The changes a compensation makes besides removing layers.

    `parameters`: (layer, parameter name within the layer) -> new value, in the parameter's dtype.
    `before`: original layer index i -> matrix (d, d) float64 applied to the hidden states that enter layer i; if i is
    removed, those that enter the next kept layer or the final norm.
    """

    parameters: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    before: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def apply(self, decoder: Decoder) -> Iterator[None]:
        """Context manager that applies `parameters`; `before` is applied only in `run`."""
        values: dict[int, dict[str, Tensor]] = {}
        for (layer, name), value in self.parameters.items():
            values.setdefault(layer, {})[name] = value
        with ExitStack() as stack:
            for layer, replaced in values.items():
                stack.enter_context(parameters_replaced(decoder.layers[layer], replaced))
            yield

    def run(self, decoder: Decoder, hidden: Tensor, kept: Sequence[int]) -> Tensor:
        """Hidden states (batch, tokens, d) after the kept layers of the patched model. `hidden`: the embedded ids."""
        waiting = sorted(self.before)
        with self.apply(decoder):
            for layer in kept:
                while waiting and waiting[0] <= layer:
                    hidden = hidden @ self.before[waiting.pop(0)].to(hidden)
                hidden = decoder.step(hidden, layer)
        for index in waiting:
            hidden = hidden @ self.before[index].to(hidden)
        return hidden

    def row_losses(self, decoder: Decoder, ids: Tensor, kept: Sequence[int]) -> Tensor:
        """Mean NLL in nats of each sequence in the patched model: (rows,) float32."""
        with torch.no_grad():
            losses = [
                decoder.row_losses(self.run(decoder, decoder.embed(row), kept), row).cpu() for row in ids.split(1)
            ]
        return torch.cat(losses)


# ---------------------------------------------------------------------------------------------------------------
# Selections
# ---------------------------------------------------------------------------------------------------------------


def shortgpt(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """ShortGPT: the `count` layers of lowest block influence, 1 - mean cos(x_i, x_{i+1}), at once. No layer is barred.

    The authors published no code; this follows the paper and the common reimplementation (sramshetty/ShortGPT).
    """
    _require(count, decoder.count)
    influence = [0.0] * decoder.count
    for states in _states(decoder, ids):
        for layer in range(decoder.count):
            influence[layer] += float((1 - _cosines(states[layer], states[layer + 1])).sum())
    order = _lowest(dict(enumerate(influence)), count)
    return PeerSelection(sorted(order), order, 1.0)


def sleb(
    decoder: Decoder,
    ids: Tensor,
    count: int,
    *,
    cached: bool = False,
    step_done: Callable[[list[int]], None] = lambda _removed: None,
) -> PeerSelection:
    """SLEB: `count` times, skip each live layer in turn and remove the one whose absence raises the loss least.

    The first and the last live layer are never tried, as with the published barriers of 1 and 1. Every trial runs the
    whole model, as published; `cached=True` computes the states before the tried layer once and runs only the rest,
    with the same operations on the same values, so the losses are bit-identical.
    `step_done` is called after every removal with the layers removed so far, in order.
    """
    _require(count, decoder.count - 2)
    live = list(range(decoder.count))
    removed: list[int] = []
    layers_run = 0
    trial_losses = _suffix_losses if cached else _trial_losses
    for _ in range(count):
        trials = range(1, len(live) - 1)
        losses, ran = trial_losses(decoder, ids, live, trials)
        layers_run += ran
        best = _lowest(dict(zip(trials, losses, strict=True)), 1)[0]
        removed.append(live.pop(best))
        step_done(list(removed))
    return PeerSelection(sorted(removed), removed, layers_run / decoder.count)


def taylor_plus(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """Taylor+ (Shortened LLaMA): sum over the weights of a layer of |W * dL/dW|, lowest first, at once.

    As published: L is the loss of all sequences together, so gradients are summed over sequences **before** the
    absolute value; every parameter named `weight` counts, norm gains included, biases do not. "+" bars layers 0-3 and
    the last two.
    """
    _require(count, decoder.count - 6)
    model = decoder.model
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    weights = [[p for name, p in layer.named_parameters() if "weight" in name] for layer in decoder.layers]
    for parameter in (parameter for layer in weights for parameter in layer):
        parameter.requires_grad_(True)
    salience: dict[int, float] = {}
    try:
        for row in ids.split(1):
            hidden = decoder.run(decoder.embed(row), range(decoder.count))
            hidden.backward(decoder.loss_gradient(hidden, row)[1])
        for layer, parameters in enumerate(weights):
            products = [p.detach() * p.grad for p in parameters if p.grad is not None]
            salience[layer] = sum(float(product.abs().sum(dtype=torch.float64)) for product in products)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
    order = _lowest({layer: salience[layer] for layer in range(4, decoder.count - 2)}, count)
    return PeerSelection(sorted(order), order, 3.0)


def llm_streamline(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """LLM-Streamline: the window of `count` layers with the highest mean cos(x_i, x_{i+count}) over all tokens.

    Like the published code, this compares transformers' `hidden_states`, whose last entry is after the final norm. The
    trained variants remove one more layer and insert a trained one; the variant "None" removes `count`.
    """
    _require(count, decoder.count)
    similarity = [0.0] * (decoder.count - count + 1)
    for states in _states(decoder, ids, normed_last=True):
        for start in range(len(similarity)):
            similarity[start] += float(_cosines(states[start], states[start + count]).mean())
    return _window({start: -value for start, value in enumerate(similarity)}, count)


def replaceme(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """ReplaceMe: the window of `count` layers with the smallest angle between x_i and x_{i+count} at each sequence's
    last token, arccos(cos) averaged over sequences.

    As published, no window starts at layer 0 (no layer before it could absorb the compensation), and the last state is
    after the final norm.
    """
    _require(count, decoder.count - 1)
    angle = {start: 0.0 for start in range(1, decoder.count - count + 1)}
    for states in _states(decoder, ids, normed_last=True):
        for start in angle:
            cosine = _cosines(states[start][-1:].double(), states[start + count][-1:].double())
            angle[start] += float(cosine.clamp(-1, 1).arccos())
    return _window(angle, count)


def linear_patch_window(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """LinearPatch's own selection: the window with the highest mean cosine similarity of its two ends.

    As published: the cosine is taken along the **tokens** of each channel (the default `dim` of torch's function) and
    averaged over channels and sequences; the paper describes the usual cosine per token. The first and the last layer
    are kept: no window starts at 0 or ends with the last layer.
    """
    _require(count, decoder.count - 2)
    similarity = {start: 0.0 for start in range(1, decoder.count - count)}
    for states in _states(decoder, ids):
        for start in similarity:
            similarity[start] += float(F.cosine_similarity(states[start], states[start + count], dim=0).mean())
    return _window({start: -value for start, value in similarity.items()}, count)


def prune_and_comp(
    decoder: Decoder, ids: Tensor, count: int, *, step_done: Callable[[list[int]], None] = lambda _removed: None
) -> tuple[PeerSelection, Patch]:
    """Prune&Comp with its default metric, CosSim(BI): `count` times, remove the layer of lowest block influence in the
    current model, then rescale the layers before the cut (see `magnitude_rescale`).

    The last live layer is barred: the published code raises an IndexError when it chooses that layer. Here one pass
    per removal gives both influence and scale; the published code makes two. `step_done` as in `sleb`.
    """
    _require(count, decoder.count - 1)
    live = list(range(decoder.count))
    rescaled = _Rescaled(decoder)
    order: list[int] = []
    layers_run = 0
    for _ in range(count):
        influence = dict.fromkeys(live[:-1], 0.0)
        scale = dict.fromkeys(live[:-1], 0.0)
        for states in rescaled.states(ids, live):
            for position, layer in enumerate(live[:-1]):
                influence[layer] += float((1 - _cosines(states[position], states[position + 1])).sum())
                scale[layer] += float(_magnitude_ratio(states[position], states[position + 1]).mean()) / len(ids)
        layers_run += len(live)
        layer = _lowest(influence, 1)[0]
        rescaled.scale_before(layer, scale[layer])
        live.remove(layer)
        order.append(layer)
        step_done(list(order))
    return PeerSelection(sorted(order), order, layers_run / decoder.count), rescaled.patch(live)


def prune_and_comp_layers(decoder: Decoder, ids: Tensor, count: int) -> PeerSelection:
    """The selection of `prune_and_comp`, without its patch."""
    return prune_and_comp(decoder, ids, count)[0]


def reverse_order(decoder: Decoder, ids: Tensor, count: int, *, keep_last: bool = False) -> PeerSelection:
    """The last `count` layers, including the final one (arXiv 2411.15558, `tail` in its code). `keep_last=True` keeps
    the final layer, as the simple heuristic of arXiv 2403.17887 does."""
    end = decoder.count - int(keep_last)
    _require(count, end)
    order = list(range(end - 1, end - 1 - count, -1))
    return PeerSelection(sorted(order), order, 0.0)


def random_layers(decoder: Decoder, ids: Tensor, count: int, *, seed: int = 0) -> PeerSelection:
    """A uniform random sample of all layers."""
    order = random.Random(seed).sample(range(decoder.count), count)
    return PeerSelection(sorted(order), order, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Compensations
# ---------------------------------------------------------------------------------------------------------------


def replaceme_transform(decoder: Decoder, ids: Tensor, removed: Sequence[int], *, alpha: float = 0.0) -> Patch:
    """ReplaceMe, least squares: for each gap [s, e), with M the MLP output of layer s - 1,

        T = argmin ||M T + (x_s - M) - x_e||^2 + alpha ||T||^2,        W_down of layer s - 1 <- T^T W_down

    over all tokens, every quantity from the original model (so several gaps are fitted independently, as with the
    published `num_A` > 1). alpha is 0 in every published configuration; ids must then hold at least d tokens.
    A gap that starts at layer 0 has no layer before it and gets no compensation. For a gap that reaches the end, the
    published code fits to the normed state, which is then normed again; here x_L is the residual stream, which favours
    the method.
    """
    gaps = [gap for gap in _gaps(removed) if gap[0] > 0]
    outputs: dict[int, Tensor] = {}

    def remember(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[layer] = output[0].detach().double()

        return hook

    left = {gap: torch.zeros(0) for gap in gaps}
    right = dict(left)
    handles = [decoder.mlp_output(start - 1).register_forward_hook(remember(start - 1)) for start, _ in gaps]
    try:
        for states in _states(decoder, ids) if gaps else ():
            for gap in gaps:
                start, end = gap
                m = outputs[start - 1]  # (tokens, d)
                target = states[end].double() - states[start].double() + m
                left[gap] = m.T @ m if not left[gap].numel() else left[gap] + m.T @ m
                right[gap] = m.T @ target if not right[gap].numel() else right[gap] + m.T @ target
    finally:
        for handle in handles:
            handle.remove()
    parameters: dict[tuple[int, str], Tensor] = {}
    prefix = decoder.architecture.mlp_output
    for gap in gaps:
        identity = torch.eye(len(left[gap]), dtype=torch.float64, device=left[gap].device)
        transform = torch.linalg.solve(left[gap] + alpha * identity, right[gap])  # (d, d)
        for name, parameter in decoder.mlp_output(gap[0] - 1).named_parameters():
            turned = transform.T @ parameter.detach().double()  # also right for a bias: (z W^T + b) T
            parameters[gap[0] - 1, f"{prefix}.{name}"] = turned.to(parameter.dtype)
    return Patch(parameters=parameters)


def linear_patch(decoder: Decoder, ids: Tensor, removed: Sequence[int]) -> Patch:
    """LinearPatch, training-free: at each cut the matrix P = Q diag(s) Q^T, Q the normalised Hadamard matrix and

        s_c = mean over rows of  mean_t |x_e Q|_c / mean_t |x_s Q|_c        for a gap [s, e), in the original model

    The published code handles one window; here every further gap is treated the same way. P multiplies the residual
    stream and cannot be folded into a weight, so the patched model is not a stock checkpoint.
    """
    gaps = _gaps(removed)
    scales: dict[int, Tensor] = {}
    rotation = torch.zeros(0)
    for states in _states(decoder, ids) if gaps else ():
        rotation = hadamard(states[0].shape[-1]).to(states[0].device)
        for start, end in gaps:
            ratio = _magnitude_ratio(states[start].double() @ rotation, states[end].double() @ rotation) / len(ids)
            scales[end] = scales[end] + ratio if end in scales else ratio
    return Patch(before={end: rotation @ scale.diag() @ rotation.T for end, scale in scales.items()})


def magnitude_rescale(decoder: Decoder, ids: Tensor, removed: Sequence[int], *, one_by_one: bool = False) -> Patch:
    """Prune&Comp's magnitude compensation: one scalar per cut [s, e),

        c = mean over channels and sequences of  mean_t |x_e| / mean_t |x_s|,

    measured in the current model (after earlier cuts and their rescaling) and multiplied onto the embedding and onto
    the attention and MLP output weights of every layer before the cut. Because the layers norm their inputs, this
    scales the residual stream at the cut by c. The published variants are one cut per contiguous window (the default
    here: gap by gap, ascending) and, for iterative metrics, one cut per layer (`one_by_one=True`, in the order of
    `removed`).

    The published code scales the embedding weight in place, which with tied embeddings scales the logits too; this
    function scales the embedded tokens (`before[0]`) and leaves the head unchanged.
    """
    cuts = [(layer, layer + 1) for layer in removed] if one_by_one else _gaps(removed)
    live = list(range(decoder.count))
    rescaled = _Rescaled(decoder)
    for start, end in cuts:
        # States up to the end of the cut; position of the cut's two ends among the live layers.
        needed = [layer for layer in live if layer < end]
        first = needed.index(start)
        scale = 0.0
        for states in rescaled.states(ids, needed):
            scale += float(_magnitude_ratio(states[first], states[-1]).mean()) / len(ids)
        rescaled.scale_before(start, scale)
        live = [layer for layer in live if not start <= layer < end]
    return rescaled.patch(live)


SELECTIONS: dict[str, Callable[[Decoder, Tensor, int], PeerSelection]] = {
    "ShortGPT": shortgpt,
    "SLEB": sleb,
    "Taylor+": taylor_plus,
    "LLM-Streamline": llm_streamline,
    "ReplaceMe": replaceme,
    "LinearPatch": linear_patch_window,
    "Prune&Comp": prune_and_comp_layers,
    "reverse order": reverse_order,
    "random": random_layers,
}
COMPENSATIONS: dict[str, Callable[[Decoder, Tensor, Sequence[int]], Patch]] = {
    "ReplaceMe": replaceme_transform,
    "LinearPatch": linear_patch,
    "Prune&Comp": magnitude_rescale,
}


# ---------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------


class _Rescaled:
    """The model with one factor on the embedded tokens and one on each layer's output to the residual stream."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._embedding = 1.0
        self._layers = [1.0] * decoder.count

    def scale_before(self, layer: int, scale: float) -> None:
        self._embedding *= scale
        for index in range(layer):
            self._layers[index] *= scale

    def states(self, ids: Tensor, layers: Sequence[int]) -> Iterator[list[Tensor]]:
        """For each sequence, the states (tokens, d) before the first and after each of `layers`."""
        # Not through `Patch.run`: a scalar on the embedding needs no matrix, and intermediate states are needed.
        with self.patch(layers).apply(self._decoder):
            yield from _states(self._decoder, ids, layers=layers, scale=self._embedding)

    def patch(self, kept: Sequence[int]) -> Patch:
        parameters: dict[tuple[int, str], Tensor] = {}
        for layer in kept:
            factor = self._layers[layer]
            if factor == 1.0:
                continue
            for path in (ATTENTION_OUTPUT, self._decoder.architecture.mlp_output):
                for name, parameter in self._decoder.layers[layer].get_submodule(path).named_parameters():
                    value = (parameter.detach().double() * factor).to(parameter.dtype)
                    parameters[layer, f"{path}.{name}"] = value
        width = self._decoder.mlp_output(0).out_features
        identity = torch.eye(width, dtype=torch.float64, device=self._decoder.device)
        return Patch(parameters, {} if self._embedding == 1.0 else {0: self._embedding * identity})


def _states(
    decoder: Decoder,
    ids: Tensor,
    *,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
    normed_last: bool = False,
) -> Iterator[list[Tensor]]:
    """For each sequence, the residual stream (tokens, d) before the first layer and after each: L + 1 tensors.

    `scale` multiplies the embedded tokens. `normed_last` applies the final norm to the last entry, as transformers'
    `hidden_states` do.
    """
    for row in ids.split(1):
        # no_grad is inside the loop, because the caller's code runs between two sequences.
        with torch.no_grad():
            hidden = decoder.embed(row) * scale
            states = [hidden[0]]
            after = decoder.run(
                hidden,
                range(decoder.count) if layers is None else layers,
                lambda _layer, state, into=states: into.append(state[0]),
            )
            if normed_last:
                states[-1] = decoder.norm(after)[0]
        yield states


def _trial_losses(decoder: Decoder, ids: Tensor, live: Sequence[int], trials: Sequence[int]) -> tuple[list[float], int]:
    """For each position in `trials`, the loss summed over sequences without that live layer; and layers run per
    sequence."""
    losses: list[float] = []
    with torch.no_grad():
        for trial in trials:
            kept = [layer for position, layer in enumerate(live) if position != trial]
            total = 0.0
            for row in ids.split(1):
                total += float(decoder.row_losses(decoder.run(decoder.embed(row), kept), row))
            losses.append(total)
    return losses, len(trials) * (len(live) - 1)


def _suffix_losses(
    decoder: Decoder, ids: Tensor, live: Sequence[int], trials: Sequence[int]
) -> tuple[list[float], int]:
    """Equal to `_trial_losses`, but later trials share the states before the tried layer."""
    losses = [0.0] * len(trials)
    ran = 0
    with torch.no_grad():
        for row in ids.split(1):
            hidden = decoder.run(decoder.embed(row), live[: trials[0]])
            ran = trials[0]
            for index, trial in enumerate(trials):
                rest = live[trial + 1 :]
                losses[index] += float(decoder.row_losses(decoder.run(hidden, rest), row))
                ran += len(rest)
                if index + 1 < len(trials):
                    hidden = decoder.step(hidden, live[trial])
                    ran += 1
    return losses, ran


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of each token's two states: (tokens, d), (tokens, d) -> (tokens,)."""
    return F.cosine_similarity(before, after, dim=-1)


def _magnitude_ratio(before: Tensor, after: Tensor) -> Tensor:
    """Per channel, mean over tokens of |after| over that of |before|: (tokens, d), (tokens, d) -> (d,) float64."""
    return after.double().abs().mean(dim=0) / before.double().abs().mean(dim=0)


def _require(count: int, most: int) -> None:
    """Check the number of layers before the first pass.

    Raises:
        ValueError: the method cannot remove this many layers of this model.
    """
    if not 0 < count <= most:
        raise ValueError(f"{count} layers to remove; for this model the method supports 1 to {most}")


def _lowest(scores: Mapping[int, float], count: int) -> list[int]:
    """The `count` keys of lowest score, lowest first; ties go to the smaller key."""
    return sorted(sorted(scores), key=scores.__getitem__)[:count]


def _window(distance: Mapping[int, float], count: int) -> PeerSelection:
    """The window of `count` layers whose start has the smallest distance."""
    start = _lowest(distance, 1)[0]
    removed = list(range(start, start + count))
    return PeerSelection(removed, removed, 1.0)


def _gaps(removed: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive removed layers, as half-open ranges in ascending order."""
    gaps: list[tuple[int, int]] = []
    for layer in sorted(removed):
        if gaps and gaps[-1][1] == layer:
            gaps[-1] = (gaps[-1][0], layer + 1)
        else:
            gaps.append((layer, layer + 1))
    return gaps


def hadamard(size: int) -> Tensor:
    """A normalised Hadamard matrix (size, size) float64: entries +-1 / sqrt(size), Q Q^T = I.

    The Kronecker product of a Sylvester matrix (powers of two) and, for the rest of `size`, a Paley matrix: 576 =
    36 * 16, where 36 comes from the prime 17. LinearPatch takes small matrices from tables; these are equal up to order
    and sign of the columns, which do not affect its patch (compared for 12, 20, 28, 36, 60, 108 and 140).

    Raises:
        ValueError: neither construction gives this size.
    """
    base = size
    while base % 2 == 0:
        base //= 2
    while size % base == 0:
        smallest = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base)
        if smallest is not None:
            doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            sylvester = torch.ones(1, 1, dtype=torch.float64)
            while len(smallest) * len(sylvester) < size:
                sylvester = torch.kron(sylvester, doubling)
            return torch.kron(smallest, sylvester) / math.sqrt(size)
        base *= 2
    raise ValueError(f"cannot construct a Hadamard matrix of size {size}")


def _paley(size: int) -> Tensor | None:
    """Paley's Hadamard matrix, entries +-1, from a prime q: size q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4)."""
    first, second = size - 1, size // 2 - 1
    if size % 4 == 0 and first % 4 == 3 and _is_prime(first):
        diagonal = torch.ones(size, dtype=torch.float64)
        diagonal[0] = -1.0
        return diagonal.diag() + _conference(first).T
    if size % 4 == 0 and second % 4 == 1 and _is_prime(second):
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        half = torch.eye(size // 2, dtype=torch.float64)
        return torch.kron(on, _conference(second)) + torch.kron(off, half)
    return None


def _conference(q: int) -> Tensor:
    """(q + 1, q + 1): zero diagonal, first row and column 1, inside +1 if i - j is a square mod q, else -1."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0 if x == 0 else 1.0 if x in squares else -1.0 for x in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
