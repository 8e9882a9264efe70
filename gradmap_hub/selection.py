"""Scores -> which layers go. Pure: numbers in, decisions out.

A single ranking is fragile (it depends on the text and on the number of tokens), so by default a handful of candidate
sets is formed from one scoring pass and the held-out loss decides; see `candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradmap_hub.record import Candidate, LayerDecision
from gradmap_hub.scoring import LayerScores

# Cosine windows among the candidates, and sets whose corrections are fitted, if their loss is this near (nats).
WINDOWS = 3
FINALISTS = 2
FINALIST_MARGIN = 0.15
_RANKS = ("second", "third")


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` lowest scores, ascending; of equal scores the earlier goes first."""
    return sorted(sorted(range(len(scores)), key=lambda position: (scores[position], position))[:count])


def lowest_window(scores: Sequence[float], count: int) -> list[int]:
    """The `count` consecutive positions with the lowest summed score."""
    starts = range(len(scores) - count + 1)
    best = min(starts, key=lambda start: sum(scores[start : start + count]))
    return list(range(best, best + count))


def candidates(scores: LayerScores, count: int, metric: str) -> dict[str, list[int]]:
    """Named candidate sets of `count` layers for a metric; `auto` gives them all, duplicates dropped."""
    by_cosine = scores.windows(count)
    starts = sorted(range(len(by_cosine)), key=lambda start: by_cosine[start])
    windows = [list(range(start, start + count)) for start in starts[:WINDOWS]]
    named = {
        "gradient": lowest(scores.gradient, count),
        "taylor": lowest(scores.taylor, count),
        "block-influence": lowest(scores.influence, count),
        "gradient-window": lowest_window(scores.gradient, count),
        "cosine-window": windows[0],
    }
    if metric != "auto":
        return {metric: named[metric]}
    named["taylor-window"] = lowest_window(scores.taylor, count)
    named |= {f"cosine-window, {rank} best": window for rank, window in zip(_RANKS, windows[1:], strict=False)}
    distinct: dict[str, list[int]] = {}
    for name, removed in named.items():
        if removed not in distinct.values():
            distinct[name] = removed
    return distinct


def finalists(found: Sequence[Candidate], corrected: bool) -> list[Candidate]:
    """The sets whose corrections are fitted, of all that were measured (lowest loss first): a correction gains more
    behind one gap than behind several, so the best after it need not be the best before."""
    if not corrected:
        return list(found[:1])
    return [candidate for candidate in found[:FINALISTS] if candidate.loss < found[0].loss + FINALIST_MARGIN]


def decide(scores: LayerScores, winner: Candidate | None, removed: Sequence[int], why: str) -> list[LayerDecision]:
    """One decision per layer, with the gradient score and the reason in words."""
    gone = set(removed)
    ranking = winner.name if winner else "your choice"
    decisions = []
    for index, score in zip(scores.layers, scores.gradient, strict=True):
        reason = f"removed: {why} ({ranking})" if index in gone else "kept"
        decisions.append(LayerDecision(index=index, score=score, kept=index not in gone, reason=reason))
    return decisions
