"""Scores -> which layers go. Pure: numbers in, decisions out.

A single ranking is fragile (it depends on the text and on the number of tokens), so by default a handful of candidate
sets is formed from one scoring pass and the held-out loss decides; see `candidates`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gradmap_hub.pruning.scoring import LayerScores
from gradmap_hub.record import Candidate, LayerDecision

# Cosine windows among the candidates, and sets whose corrections are fitted, if their loss is this near (nats).
WINDOWS = 3
FINALISTS = 3
FINALIST_MARGIN = 0.25
_WINDOW_NAMES = ("cosine-window", "cosine-window, second best", "cosine-window, third best")


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` lowest scores, ascending; of equal scores the earlier goes first."""
    return sorted(sorted(range(len(scores)), key=lambda position: (scores[position], position))[:count])


def lowest_window(scores: Sequence[float], count: int) -> list[int]:
    """The `count` consecutive positions with the lowest summed score."""
    starts = range(len(scores) - count + 1)
    best = min(starts, key=lambda start: sum(scores[start : start + count]))
    return list(range(best, best + count))


def windows(scores: LayerScores, count: int) -> dict[str, list[int]]:
    """The WINDOWS windows of `count` layers across which the hidden states turn least, by name."""
    by_cosine = scores.windows(count)
    starts = sorted(range(len(by_cosine)), key=lambda start: by_cosine[start])
    return {
        name: list(range(start, start + count)) for name, start in zip(_WINDOW_NAMES, starts[:WINDOWS], strict=False)
    }


def candidates(scores: LayerScores, count: int, metric: str) -> dict[str, list[int]]:
    """Named candidate sets of `count` layers for a metric; `auto` gives them all, duplicates dropped."""
    named = {
        "gradient": lowest(scores.gradient, count),
        "taylor": lowest(scores.taylor, count),
        "block-influence": lowest(scores.influence, count),
        "gradient-window": lowest_window(scores.gradient, count),
        "taylor-window": lowest_window(scores.taylor, count),
        **windows(scores, count),
    }
    if metric != "auto":
        return {metric: named[metric]}
    distinct: dict[str, list[int]] = {}
    for name, removed in named.items():
        if removed not in distinct.values():
            distinct[name] = removed
    return distinct


def stems(scores: LayerScores, count: int, metric: str) -> dict[str, list[int]]:
    """Windows of one layer less, to be completed by whichever layer loses least with them; for `auto` alone."""
    return windows(scores, count - 1) if metric == "auto" and count > 1 else {}


def finalists(found: Sequence[Candidate], corrected: bool) -> list[Candidate]:
    """The sets whose corrections are fitted, of all that were measured (lowest loss first).

    A correction gains more where there is one gap than where the same layers leave several, so the best set after it
    need not be the best before: the best of each number of gaps come first, then the next best.
    """
    if not corrected:
        return list(found[:1])
    near = [candidate for candidate in found if candidate.loss < found[0].loss + FINALIST_MARGIN]
    seen: Counter[int] = Counter()
    turns: list[tuple[int, float, Candidate]] = []
    for candidate in near:
        number = gaps(candidate.removed)
        turns.append((seen[number], candidate.loss, candidate))
        seen[number] += 1
    return [candidate for _, _, candidate in sorted(turns, key=lambda turn: turn[:2])[:FINALISTS]]


def gaps(removed: Sequence[int]) -> int:
    """How many runs of consecutive layers are missing."""
    gone = set(removed)
    return sum(layer - 1 not in gone for layer in gone)


def decide(scores: LayerScores, winner: Candidate | None, removed: Sequence[int], why: str) -> list[LayerDecision]:
    """One decision per layer, with the gradient score and the reason in words."""
    gone = set(removed)
    ranking = winner.name if winner else "your choice"
    decisions = []
    for index, score in zip(scores.layers, scores.gradient, strict=True):
        reason = f"removed: {why} ({ranking})" if index in gone else "kept"
        decisions.append(LayerDecision(index=index, score=score, kept=index not in gone, reason=reason))
    return decisions
