"""Compares two models on the same held-out sequences: perplexity, metrics of one against the other, intervals.

With N the negative log-likelihood per predicted token (nats), sequences r and positions t that predict a token:

    perplexity          exp(mean_r N_r)
    top-1 agreement     mean_t [argmax p_t = argmax q_t]            p: original, q: pruned
    KL divergence       mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))

A metric needs both distributions at every position. The original is reduced to its states after the final norm
(tokens, d) and its output head; its logits are recomputed from them, chunk by chunk, next to those of the pruned model.
The two models are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmap_hub.models.decoder import LOGIT_CHUNK, Decoder

BOOTSTRAP_DRAWS = 2000
# Most draws x values in memory at once; a task has up to ten thousand documents.
_DRAWN_AT_ONCE = 1 << 22


def perplexity(losses: Sequence[float]) -> float:
    """exp(mean) of the mean NLL of each sequence; all sequences predict the same number of tokens."""
    return math.exp(math.fsum(losses) / len(losses))


def ratio_interval(original: Sequence[float], changed: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of perplexity(changed) / perplexity(original): paired bootstrap over sequences."""
    difference = torch.tensor(changed, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    return [math.exp(end) for end in _mean_interval(difference, seed)]


def difference_interval(original: Sequence[float], changed: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of mean(changed) - mean(original): paired bootstrap over sequences or documents."""
    difference = torch.tensor(changed, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    return _mean_interval(difference, seed)


def mean_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95% bootstrap interval of the mean of `values`."""
    return _mean_interval(torch.tensor(values, dtype=torch.float64), seed)


def _mean_interval(values: Tensor, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(BOOTSTRAP_DRAWS, _DRAWN_AT_ONCE // len(values)))
    means: list[Tensor] = []
    for start in range(0, BOOTSTRAP_DRAWS, at_once):
        count = min(at_once, BOOTSTRAP_DRAWS - start)
        means.append(values[torch.randint(len(values), (count, len(values)), generator=generator)].mean(dim=1))
    ordered = torch.cat(means).sort().values
    low, high = ordered[int(0.025 * BOOTSTRAP_DRAWS)], ordered[int(0.975 * BOOTSTRAP_DRAWS) - 1]
    return [float(low), float(high)]


# Log-probabilities (tokens, vocabulary) float32 of the original and of the pruned model at positions that predict a
# token, and those tokens (tokens,) int64 -> one value per position (tokens,). The arguments must not be changed.
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


def top1_agreement(original: Tensor, pruned: Tensor, targets: Tensor) -> Tensor:
    """1 where both models have the same top-1 token, else 0."""
    del targets
    return original.argmax(-1) == pruned.argmax(-1)


def kl_divergence(original: Tensor, pruned: Tensor, targets: Tensor) -> Tensor:
    """KL(original || pruned) in nats."""
    del targets
    return original.exp().mul_(original - pruned).sum(-1).clamp_(min=0)  # in place: these tensors are the largest


@dataclass(frozen=True)
class Comparison:
    """Per sequence: mean NLL of the pruned model, and the mean of each metric under its name."""

    losses: list[float]
    metrics: dict[str, list[float]]


def reference_states(
    decoder: Decoder, ids: Tensor, rows_done: Callable[[int], None] = lambda _rows: None
) -> tuple[list[float], Tensor]:
    """Mean NLL of each sequence of `ids` (rows, tokens), and the states after the final norm (rows, tokens, d)."""
    losses: list[float] = []
    states: list[Tensor] = []
    with torch.no_grad():
        for row in ids.split(1):
            hidden = decoder.run(decoder.embed(row), range(decoder.count))
            losses.append(float(decoder.row_losses(hidden, row)))
            states.append(decoder.norm(hidden)[0].cpu())
            rows_done(1)
    return losses, torch.stack(states)


def compare_rows(
    decoder: Decoder,
    ids: Tensor,
    states: Tensor,
    output: nn.Linear,
    metrics: Mapping[str, Metric],
    rows_done: Callable[[int], None] = lambda _rows: None,
) -> Comparison:
    """Compare a model with a reference on `ids` (rows, tokens).

    Args:
        states: Of the reference, after its final norm (rows, tokens, d).
        output: Output embedding of the reference.
        metrics: Name -> metric.
        rows_done: Called with 1 after each sequence.
    """
    found = Comparison([], {name: [] for name in metrics})
    reference_head = decoder.head_of(output.to(decoder.device))
    with torch.no_grad():
        for row, reference in zip(ids.split(1), states, strict=True):
            hidden = decoder.norm(decoder.run(decoder.embed(row), range(decoder.count)))[0]
            targets = row[0, 1:].to(decoder.device)
            loss, sums = 0.0, dict.fromkeys(metrics, 0.0)
            for start in range(0, len(targets), LOGIT_CHUNK):
                part = slice(start, min(start + LOGIT_CHUNK, len(targets)))
                original = reference_head(reference[part].to(decoder.device)).float().log_softmax(-1)
                pruned = decoder.head(hidden[part]).float().log_softmax(-1)
                loss -= float(pruned.gather(-1, targets[part].unsqueeze(-1)).double().sum())
                for name, metric in metrics.items():
                    sums[name] += float(metric(original, pruned, targets[part]).double().sum())
            found.losses.append(loss / len(targets))
            for name, total in sums.items():
                found.metrics[name].append(total / len(targets))
            rows_done(1)
    return found
