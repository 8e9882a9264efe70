"""Stage 1: how much each decoder layer matters, from one forward and backward pass per calibration sequence.

GradMAP (arXiv 2602.14649) ranks layers by gradient magnitude of the language-modelling loss L. Its exact formula is
not public; ours, for calibration sequences s and the weight matrices W of layer l:

    gradient[l] = sum_s sum_W || dL_s / dW ||_1          the absolute value is taken per sequence, then summed

Gradients accumulated over sequences before the norm would cancel: the mean gradient of a trained model tends to zero,
and more calibration text makes that ranking worse. The same pass also yields:

    taylor[l]    = sum_s sum_W || W * dL_s / dW ||_1     (as in LLM-Pruner and Shortened LLaMA, per sequence)
    distance[i][j] = 1 - mean cos(x_i, x_j)              x_l: residual stream before layer l; x_L: after the last
    influence[l] = distance[l][l + 1]                    block influence, ShortGPT (arXiv 2403.03853)
    windows(k)[i] = distance[i][i + k]                   k consecutive layers as one block (arXiv 2403.17887)
    shift[l]     = ||mean(x_{l+1} - x_l)|| / ||mean(x_{l+1})||    first moment of what the layer adds

and, from the gradients of the residual stream alone, with means over all tokens but the first of each sequence, whose
activations are massive:

    gate[l]      = mean |<dL_s / dx_{l+1}, x_{l+1} - x_l>|        |dL / d(gate of layer l)|, token by token
    cost[i][j]   = mean ||dL_s / dx_j||^2 ||x_j - x_i||^2         a bound on the squared change of L without i .. j-1

`cost` is a first-order bound: by Cauchy-Schwarz, replacing x_j by x_i changes L by at most its square root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pruning.scores import LayerScores

# Beyond any trained model: massive activations reach a few thousand, and a uniform guess costs at most 14 nats.
_LARGEST_ACTIVATION, _LARGEST_LOSS = 1e12, 500.0
_HINT = "The weights are probably damaged: fetch them again, or use another revision."


def score_layers(
    decoder: Decoder,
    ids: Tensor,
    *,
    layers: Sequence[int] | None = None,
    weights: bool = True,
    row_done: Callable[[], None] = lambda: None,
) -> LayerScores:
    """Score `layers` (default: all), run in this order, on sequences `ids` (n, tokens).

    Without `weights`, the gradients of the weights are not computed, and `gradient` and `taylor` are empty. `row_done`
    is called after each sequence.

    The forward pass keeps only the residual stream between layers; the backward pass recomputes each layer's
    activations (checkpointing), so that only the activations of one layer and the gradient of one weight exist at a
    time. Embeddings, final norm and head are not scored.

    Raises:
        BrokenCheckpointError: the activations or the loss are NaN, infinite or beyond those of any trained model.
    """
    chosen = list(range(decoder.count)) if layers is None else list(layers)
    gradient = dict.fromkeys(chosen, 0.0)
    taylor = dict.fromkeys(chosen, 0.0)
    similarity = torch.zeros(len(chosen) + 1, len(chosen) + 1, dtype=torch.float64)
    gate = dict.fromkeys(chosen, 0.0)
    cost = torch.zeros(len(chosen) + 1, len(chosen) + 1, dtype=torch.float64)
    means: list[Tensor] = []
    loss_sum = 0.0
    with decoder.frozen():
        for group in ids.split(decoder.rows_per_pass):
            rows = group.split(1)
            with torch.no_grad():
                stream = [[decoder.embed(row)] for row in rows]  # per sequence: each layer's input, the last output
                for layer in chosen:
                    with decoder.layer(layer):
                        for states in stream:
                            states.append(decoder.step(states[-1], layer))
            for states in stream:
                similarity += _mean_cosines(states)
                means.append(torch.stack([state.double().mean(dim=(0, 1)) for state in states]).cpu())
                _check_usable(means[-1], chosen)
            gradients: list[Tensor] = []
            displacements = [_displacements(states) for states in stream]
            outputs: list[Tensor] = []  # per sequence: of the layer whose turn it is
            for row, states in zip(rows, stream, strict=True):
                outputs.append(states.pop())
                loss, last = decoder.loss_gradient(outputs[-1], row)
                loss_sum += float(loss)
                if not loss_sum / len(ids) < _LARGEST_LOSS:  # also NaN
                    raise BrokenCheckpointError(
                        f"The loss of the original is {float(loss):g} nats per token, not that of a trained model.",
                        hint=_HINT,
                    )
                gradients.append(last)
            for place, layer in reversed(list(enumerate(chosen))):

                def reduce(_name: str, parameter: Tensor, layer: int = layer) -> None:
                    assert parameter.grad is not None
                    # In place: a temporary of the gradient's size costs more than the sum.
                    magnitude = parameter.grad.abs_()
                    gradient[layer] += float(magnitude.sum(dtype=torch.float32))
                    taylor[layer] += float(magnitude.mul_(parameter.detach()).abs_().sum(dtype=torch.float32))

                with decoder.layer(layer):
                    for position, states in enumerate(stream):
                        entering, leaving = states.pop(), gradients[position]
                        cost[:, place + 1] += _costs(displacements[position][..., place + 1], leaving)
                        gate[layer] += _gate(outputs[position] - entering, leaving)
                        gradients[position] = decoder.backward(entering, layer, leaving, reduce if weights else None)
                        outputs[position] = entering
            for _ in rows:
                row_done()
    mean = torch.stack(means).mean(dim=0)  # (layers + 1, d)
    moved = (mean[1:] - mean[:-1]).norm(dim=-1) / mean[1:].norm(dim=-1).clamp(min=1e-12)
    return LayerScores(
        layers=chosen,
        gradient=[gradient[layer] for layer in chosen] if weights else [],
        taylor=[taylor[layer] for layer in chosen] if weights else [],
        distance=(1 - similarity / len(ids)).tolist(),
        shift=moved.tolist(),
        gate=[gate[layer] / len(ids) for layer in chosen],
        cost=(cost / len(ids)).triu(1).tolist(),
        loss=loss_sum / len(ids),
        rows=len(ids),
    )


def _check_usable(means: Tensor, layers: Sequence[int]) -> None:
    """Check the `means` over tokens of the embeddings and of the output of each of `layers`, (layers + 1, d).

    Raises:
        BrokenCheckpointError: one is not finite or too large; the error names the first.
    """
    wrong = ~(means.abs() < _LARGEST_ACTIVATION).all(dim=-1)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        where = f"layer {layers[place - 1]}" if place else "the embedding"
        raise BrokenCheckpointError(f"The output of {where} of the original is not finite or too large.", hint=_HINT)


def iterative_removals(
    decoder: Decoder, ids: Tensor, count: int, *, row_done: Callable[[], None] = lambda: None
) -> list[int]:
    """Choose `count` layers one at a time: each time, score the rest again and remove the layer with the lowest
    gradient L1 norm. Returns their indices, ascending."""
    left = list(range(decoder.count))
    removed: list[int] = []
    for _ in range(count):
        scores = score_layers(decoder, ids, layers=left, row_done=row_done)
        worst = min(range(len(left)), key=lambda position: scores.gradient[position])
        removed.append(left.pop(worst))
    return sorted(removed)


# Tokens whose directions are multiplied at once: a normalised copy of a whole stream would double its memory.
_TOKENS_AT_ONCE = 64


def _mean_cosines(states: Sequence[Tensor]) -> Tensor:
    """Mean over tokens of the cosine between every two of n streams (1, tokens, d) of a sequence: (n, n) float64."""
    tokens = states[0].shape[1]
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for start in range(0, tokens, _TOKENS_AT_ONCE):
        part = torch.stack([state[0, start : start + _TOKENS_AT_ONCE].float() for state in states])
        directions = F.normalize(part, dim=-1).flatten(1)
        total += (directions @ directions.T).double().cpu()
    return total / tokens


def _displacements(states: Sequence[Tensor]) -> Tensor:
    """||x_j - x_i||^2 per token but the first of n streams (1, tokens, d) of a sequence: (tokens - 1, n, n) float32."""
    found = []
    for start in range(1, states[0].shape[1], _TOKENS_AT_ONCE):
        part = torch.stack([state[0, start : start + _TOKENS_AT_ONCE].float() for state in states], dim=1)
        # Differences, not products: those of large activations cancel.
        found.append(torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square().cpu())
    return torch.cat(found)


def _costs(displacements: Tensor, gradient: Tensor) -> Tensor:
    """Mean over tokens of ||gradient||^2 times each of n displacements (tokens - 1, n): (n,) float64."""
    weight = gradient[0, 1:].double().square().sum(dim=-1).cpu()
    return (weight[:, None] * displacements.double()).mean(dim=0)


def _gate(added: Tensor, gradient: Tensor) -> float:
    """Mean over tokens but the first of |<gradient, added>|, both (1, tokens, d)."""
    return float((added[0, 1:].float() * gradient[0, 1:].float()).sum(dim=-1).abs().mean())
