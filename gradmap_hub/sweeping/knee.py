"""Recommends a ratio from the measured ones: the knee of the curve, or the largest ratio within a bound.

    x    share of the layers removed
    y    log(perplexity / perplexity of the original)          0 at x = 0

The knee is the ratio farthest below the chord from the original (0, 0) to the largest ratio. Up to the knee, a further
layer costs less than the average over the whole range, beyond it more. The chord depends on the measured ratios, so
other ratios may have another knee. Only ratios whose whole interval lies below the chord are considered, because noise
alone can put a point below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmap_hub.sweeping.record import Recommendation, SweepPoint

# A curve through fewer ratios cannot bend.
LEAST_POINTS = 3


def knee_of(points: Sequence[SweepPoint]) -> tuple[SweepPoint | None, str]:
    """The knee, or None, and an explanation either way.

    Args:
        points: In ascending order of the layers removed.
    """
    known = [point for point in points if _is_known(point)]
    if len(known) < LEAST_POINTS:
        return None, f"no knee: this needs at least {LEAST_POINTS} ratios that remove different numbers of layers"
    last = known[-1]
    slope = math.log(last.perplexity) / last.share
    below = [point for point in known[:-1] if math.log(point.interval[1]) < slope * point.share]
    if not below:
        return None, "no knee: at no ratio is the loss clearly below the average over the measured range"
    found = max(below, key=lambda point: slope * point.share - math.log(point.perplexity))
    return found, (
        f"the knee: up to here, a further layer costs less than the average over the range to {last.ratios[0]:g}, "
        "beyond it more"
    )


def _is_known(point: SweepPoint) -> bool:
    values = [point.perplexity, *point.interval]
    return len(values) == 3 and all(math.isfinite(value) and value > 0 for value in values)


def recommend(points: Sequence[SweepPoint], max_loss: float | None = None) -> Recommendation:
    """The knee, or the largest ratio at which perplexity rises by at most `max_loss` percent.

    Args:
        points: In ascending order of the layers removed.
        max_loss: None: recommend the knee.
    """
    found, why = knee_of(points)
    knee = found.ratios[0] if found is not None else None
    if max_loss is None:
        return Recommendation(knee, why, knee, why)
    allowed = [point for point in points if point.perplexity <= 1 + max_loss / 100]
    if not allowed:
        reason = f"perplexity rises by more than {max_loss:g} % at every measured ratio"
        return Recommendation(None, reason, knee, why, max_loss)
    reason = f"the largest measured ratio at which perplexity rises by {max_loss:g} % or less"
    return Recommendation(allowed[-1].ratios[0], reason, knee, why, max_loss)
