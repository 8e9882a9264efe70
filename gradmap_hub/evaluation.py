"""Token perplexity on rows that calibration never saw: exp of the mean negative log-likelihood per predicted token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BOOTSTRAP_DRAWS = 2000


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
