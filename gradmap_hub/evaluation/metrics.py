"""Two models on the same rows that calibration never saw: token perplexity, agreement, divergence, and their intervals.

With N the negative log-likelihood per predicted token (nats), rows r and positions t that predict a token:

    perplexity          exp(mean_r N_r)
    top-1 agreement     mean_t [argmax p_t = argmax q_t]            p: original, q: pruned
    divergence          mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))

Agreement and divergence need both distributions, of which each position has as many numbers as there are tokens. What
is kept of the original is one step earlier and exact: its states behind the final norm (tokens, d) and its output head,
from which its logits are formed again, chunk by chunk, beside those of the other model. So the two models are never in
memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmap_hub.models.decoder import LOGIT_CHUNK, Decoder

BOOTSTRAP_DRAWS = 2000
# Draws x values that exist at once; a task has up to ten thousand documents.
_DRAWN_AT_ONCE = 1 << 22


def perplexity(losses: Sequence[float]) -> float:
    """exp(mean); every row has the same number of predicted tokens."""
    return math.exp(math.fsum(losses) / len(losses))


def ratio_interval(original: Sequence[float], changed: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of perplexity(changed) / perplexity(original): paired bootstrap over rows."""
    difference = torch.tensor(changed, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    return [math.exp(end) for end in _mean_interval(difference, seed)]


def difference_interval(original: Sequence[float], changed: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of mean(changed) - mean(original): paired bootstrap over rows or documents."""
    difference = torch.tensor(changed, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    return _mean_interval(difference, seed)


def mean_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95% bootstrap interval of the mean."""
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


@dataclass(frozen=True)
class Compared:
    """Per row: mean NLL of the model, share of positions where it agrees with the reference, mean divergence."""

    losses: list[float]
    agreement: list[float]
    divergence: list[float]


def reference_states(
    decoder: Decoder, ids: Tensor, rows_done: Callable[[int], None] = lambda _rows: None
) -> tuple[list[float], Tensor]:
    """Mean NLL of each row of `ids` (rows, tokens), and the states behind the final norm (rows, tokens, d)."""
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
    rows_done: Callable[[int], None] = lambda _rows: None,
) -> Compared:
    """The model against the reference whose `states` (rows, tokens, d) and `output` embedding these are, on `ids`."""
    found = Compared([], [], [])
    head = decoder.head_of(output.to(decoder.device))
    with torch.no_grad():
        for row, reference in zip(ids.split(1), states, strict=True):
            hidden = decoder.run(decoder.embed(row), range(decoder.count))
            targets = row[0, 1:].to(decoder.device)
            values = _compare(decoder.head, decoder.norm(hidden)[0], head, reference.to(decoder.device), targets)
            for kept, value in zip((found.losses, found.agreement, found.divergence), values, strict=True):
                kept.append(value)
            rows_done(1)
    return found


def _compare(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    reference_head: Callable[[Tensor], Tensor],
    reference: Tensor,
    targets: Tensor,
) -> tuple[float, float, float]:
    """Mean NLL, share of equal likeliest tokens and mean divergence over the positions of a row that predict one of
    its tokens. `states`, `reference`: (tokens, d) of the two models; `targets`: (tokens - 1,)."""
    count = len(targets)
    loss, equal, total = 0.0, 0, 0.0
    for start in range(0, count, LOGIT_CHUNK):
        part = slice(start, min(start + LOGIT_CHUNK, count))
        wanted = reference_head(reference[part]).float().log_softmax(-1)
        found = head(states[part]).float().log_softmax(-1)
        loss -= float(found.gather(-1, targets[part].unsqueeze(-1)).double().sum())
        equal += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        found.neg_().add_(wanted)  # log p - log q, in place: these are the biggest tensors of all
        total += float(wanted.exp_().mul_(found).sum(-1).clamp_(min=0).double().sum())
    return loss / count, equal / count, total / count
