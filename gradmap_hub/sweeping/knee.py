"""How much to remove, from what was measured: the knee of the curve, or the largest ratio within a bound.

    x    share of the layers removed
    y    log(perplexity / perplexity of the original)          0 at x = 0

The knee is the ratio farthest below the chord from the original (0, 0) to the largest ratio. Up to there a further
layer costs less than the average over the whole range, beyond it more. The chord is that of what was measured: other
ratios may have another knee. A ratio counts only if its whole interval lies below the chord, or noise would make knees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmap_hub.sweeping.record import Recommendation, SweepPoint

# Ratios between which a curve can bend.
LEAST_POINTS = 3


def knee_of(points: Sequence[SweepPoint]) -> tuple[SweepPoint | None, str]:
    """The knee, if there is one, and what it is or why there is none. `points`: fewest layers removed first."""
    known = [point for point in points if _is_known(point)]
    if len(known) < LEAST_POINTS:
        return None, f"no knee: it takes {LEAST_POINTS} ratios that remove different numbers of layers"
    last = known[-1]
    slope = math.log(last.perplexity) / last.share
    below = [point for point in known[:-1] if math.log(point.interval[1]) < slope * point.share]
    if not below:
        return None, "no knee: at no ratio is the loss clearly below its average over the range measured"
    found = max(below, key=lambda point: slope * point.share - math.log(point.perplexity))
    return found, (
        f"the knee: up to here a further layer costs less than the average over the range to {last.ratios[0]:g}, "
        "beyond it more"
    )


def _is_known(point: SweepPoint) -> bool:
    values = [point.perplexity, *point.interval]
    return len(values) == 3 and all(math.isfinite(value) and value > 0 for value in values)


def recommend(points: Sequence[SweepPoint], max_loss: float | None = None) -> Recommendation:
    """The knee, or with `max_loss` the largest ratio at which perplexity rises by at most so many percent."""
    found, why = knee_of(points)
    knee = found.ratios[0] if found is not None else None
    if max_loss is None:
        return Recommendation(knee, why, knee, why)
    allowed = [point for point in points if point.perplexity <= 1 + max_loss / 100]
    if not allowed:
        reason = f"at no ratio measured does perplexity rise by {max_loss:g} % or less"
        return Recommendation(None, reason, knee, why, max_loss)
    reason = f"the largest ratio measured at which perplexity rises by {max_loss:g} % or less"
    return Recommendation(allowed[-1].ratios[0], reason, knee, why, max_loss)
