"""Stage 1: how much each decoder layer matters, from one forward and backward pass per calibration row.

GradMAP (arXiv 2602.14649) ranks layers by gradient magnitude of the language-modelling loss L. Its exact formula is
not public; ours, for calibration rows s and the weight matrices W of layer l:

    gradient[l] = sum_s sum_W || dL_s / dW ||_1          the absolute value is taken per row, then summed

Accumulating gradients over rows first lets them cancel: the mean gradient of a trained model tends to zero, and more
calibration text makes that ranking worse. The same pass yields, at no extra forward or backward:

    taylor[l]    = sum_s sum_W || W * dL_s / dW ||_1     (as in LLM-Pruner and Shortened LLaMA, per row)
    influence[l] = 1 - mean cos(x_l, x_{l+1})            block influence, ShortGPT (arXiv 2403.03853), x_l: layer input
    windows[i]   = 1 - mean cos(x_i, x_{i+k})            k consecutive layers as one block (arXiv 2403.17887)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmap_hub.decoder import Decoder


@dataclass(frozen=True)
class LayerScores:
    """One value per layer (indices into `layers`), except `windows`: one per start of a window. Low = unimportant."""

    layers: list[int]
    gradient: list[float]
    taylor: list[float]
    influence: list[float]
    windows: list[float]
    window_size: int
    loss: float
    rows: int = field(default=0)


def score_layers(
    decoder: Decoder,
    ids: Tensor,
    *,
    window: int,
    layers: Sequence[int] | None = None,
    row_done: Callable[[], None] = lambda: None,
) -> LayerScores:
    """Score `layers` (default: all) as they stand in sequence, on rows `ids` (n, tokens).

    Embeddings, final norm and head are frozen and never count. Each weight's gradient is reduced to two numbers as
    soon as it exists and freed at once, so that only one is alive at a time.
    """
    chosen = list(range(decoder.count)) if layers is None else list(layers)
    gradient = dict.fromkeys(chosen, 0.0)
    taylor = dict.fromkeys(chosen, 0.0)
    influence = torch.zeros(len(chosen), dtype=torch.float64)
    windows = torch.zeros(max(len(chosen) - window + 1, 0), dtype=torch.float64)
    loss_sum = 0.0

    def reduce_into(layer: int) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is None:
                return
            # In place: the gradient is not needed again, and a temporary of its size per product costs more than
            # the arithmetic.
            magnitude = grad.abs_()
            gradient[layer] += float(magnitude.sum())
            taylor[layer] += float(magnitude.mul_(parameter.detach()).abs_().sum())
            parameter.grad = None

        return reduce

    trainable = {name: parameter.requires_grad for name, parameter in decoder.model.named_parameters()}
    decoder.model.requires_grad_(False)
    handles = []
    for layer in chosen:
        for parameter in _matrices(decoder.layers[layer]):
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(reduce_into(layer)))
    try:
        for row in ids.split(1):
            inputs: list[Tensor] = []
            hidden = decoder.embed(row).detach()
            inputs.append(hidden)
            last = decoder.run(hidden, chosen, lambda _layer, after, seen=inputs: seen.append(after.detach()))
            loss = decoder.row_losses(last, row).sum()
            loss.backward()
            loss_sum += float(loss.detach())
            for position in range(len(chosen)):
                influence[position] += 1 - _mean_cosine(inputs[position], inputs[position + 1])
            for start in range(len(windows)):
                windows[start] += 1 - _mean_cosine(inputs[start], inputs[start + window])
            row_done()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in decoder.model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
    return LayerScores(
        layers=chosen,
        gradient=[gradient[layer] for layer in chosen],
        taylor=[taylor[layer] for layer in chosen],
        influence=(influence / len(ids)).tolist(),
        windows=(windows / len(ids)).tolist(),
        window_size=window,
        loss=loss_sum / len(ids),
        rows=len(ids),
    )


def iterative_removals(
    decoder: Decoder, ids: Tensor, count: int, *, row_done: Callable[[], None] = lambda: None
) -> list[int]:
    """Remove `count` layers one at a time, scoring what is left anew before each removal (gradient L1)."""
    left = list(range(decoder.count))
    removed: list[int] = []
    for _ in range(count):
        scores = score_layers(decoder, ids, window=1, layers=left, row_done=row_done)
        worst = min(range(len(left)), key=lambda position: scores.gradient[position])
        removed.append(left.pop(worst))
    return sorted(removed)


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    """Weight matrices only: norm gains and biases are tiny and differently scaled."""
    return [parameter for parameter in layer.parameters() if parameter.ndim >= 2]


def _mean_cosine(before: Tensor, after: Tensor) -> float:
    return float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())
