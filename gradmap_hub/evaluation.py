"""Token perplexity on rows that calibration never saw: exp of the mean negative log-likelihood per predicted token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradmap_hub.decoder import Decoder

BOOTSTRAP_DRAWS = 2000


def row_losses(
    decoder: Decoder,
    ids: Tensor,
    layers: Sequence[int] | None = None,
    row_done: Callable[[], None] = lambda: None,
) -> list[float]:
    """Mean NLL (nats per token) of each row of `ids` (n, tokens) with only `layers` active (default: all)."""
    active = range(decoder.count) if layers is None else layers
    losses: list[float] = []
    with torch.no_grad():
        for row in ids.split(1):
            losses.append(float(decoder.row_losses(decoder.run(decoder.embed(row), active), row)))
            row_done()
    return losses


def perplexity(losses: Sequence[float]) -> float:
    """exp(mean); every row has the same number of predicted tokens."""
    return math.exp(math.fsum(losses) / len(losses))


def ratio_interval(original: Sequence[float], changed: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of perplexity(changed) / perplexity(original): paired bootstrap over rows."""
    difference = torch.tensor(changed, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(difference), (BOOTSTRAP_DRAWS, len(difference)), generator=generator)
    means = difference[draws].mean(dim=1).sort().values
    low, high = means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS) - 1]
    return [math.exp(float(low)), math.exp(float(high))]
