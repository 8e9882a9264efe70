"""Scores -> candidate sets of layers to remove. Pure: numbers in, decisions out.

A single ranking is fragile (it depends on the text and on the number of tokens). By default all rankings of one scoring
pass therefore propose sets, and the held-out loss decides; see `candidates`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from gradmap_hub.config import METRICS
from gradmap_hub.pruning.scores import LayerScores
from gradmap_hub.record import Candidate, LayerDecision

# (scores, count) -> positions of the `count` layers to remove, ascending.
Ranking = Callable[[LayerScores, int], list[int]]

# Windows of lowest cosine distance among the candidates.
WINDOWS = 3
# Compensation is fitted for at most FINALISTS sets, whose loss without it is less than FINALIST_MARGIN (nats per token)
# above the lowest.
FINALISTS = 3
FINALIST_MARGIN = 0.25
_WINDOW_NAMES = ("cosine-window", "cosine-window, second best", "cosine-window, third best")


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` lowest scores, ascending; of equal scores the earlier one is taken."""
    return sorted(sorted(range(len(scores)), key=lambda position: (scores[position], position))[:count])


def lowest_window(scores: Sequence[float], count: int) -> list[int]:
    """The `count` consecutive positions with the lowest summed score."""
    starts = range(len(scores) - count + 1)
    best = min(starts, key=lambda start: sum(scores[start : start + count]))
    return list(range(best, best + count))


def windows(scores: LayerScores, count: int) -> dict[str, list[int]]:
    """Name -> positions of the WINDOWS windows of `count` layers with the lowest cosine distance across them."""
    by_cosine = scores.windows(count)
    starts = sorted(range(len(by_cosine)), key=lambda start: by_cosine[start])
    return {
        name: list(range(start, start + count)) for name, start in zip(_WINDOW_NAMES, starts[:WINDOWS], strict=False)
    }


def cheapest_blocks(cost: Sequence[Sequence[float]], count: int, most_blocks: int | None = None) -> list[int]:
    """The positions of `count` layers, ascending, whose blocks (runs of consecutive layers) have the lowest summed
    cost. Exact, by dynamic programming in O(layers * count^2 * blocks).

    Args:
        cost: (layers + 1) x (layers + 1); entry (i, j) is the cost of removing the block at positions i to j - 1.
        most_blocks: Maximum number of blocks; None: no limit.
    """
    layers = len(cost) - 1
    most = count if most_blocks is None else min(most_blocks, count)
    # best[at][(removed, blocks)]: the lowest cost of deciding on the positions before `at`, of which the last is kept,
    # and its blocks.
    best: list[dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]]] = [{} for _ in range(layers + 2)]
    best[0][0, 0] = (0.0, ())

    def offer(at: int, removed: int, spent: float, chosen: tuple[tuple[int, int], ...]) -> None:
        known = best[at].get((removed, len(chosen)))
        if known is None or spent < known[0]:
            best[at][removed, len(chosen)] = (spent, chosen)

    for at in range(layers + 1):
        for (removed, blocks), (spent, chosen) in list(best[at].items()):
            offer(at + 1, removed, spent, chosen)
            if blocks < most:
                for end in range(at + 1, min(layers, at + count - removed) + 1):
                    # The position `end` is kept, or there is none.
                    offer(end + 1, removed + end - at, spent + cost[at][end], (*chosen, (at, end)))
    found = [entry for (removed, _), entry in best[layers + 1].items() if removed == count]
    _, blocks = min(found)
    return [position for start, end in blocks for position in range(start, end)]


# The values of --metric besides auto, which config.METRICS lists too.
RANKINGS: dict[str, Ranking] = {
    "gradmap": lambda scores, count: cheapest_blocks(scores.cost, count),
    "gate": lambda scores, count: lowest(scores.gate, count),
    "gradient": lambda scores, count: lowest(scores.gradient, count),
    "taylor": lambda scores, count: lowest(scores.taylor, count),
    "block-influence": lambda scores, count: lowest(scores.influence, count),
    "gradient-window": lambda scores, count: lowest_window(scores.gradient, count),
    "taylor-window": lambda scores, count: lowest_window(scores.taylor, count),
    "cosine-window": lambda scores, count: windows(scores, count)["cosine-window"],
}


def register(name: str, ranking: Ranking) -> None:
    """Add a ranking for this process: `--metric name` selects it, and under `auto` it competes with the others.

    Raises:
        ValueError: the name is taken.
    """
    if name in METRICS:
        raise ValueError(f"the metric {name!r} already exists")
    RANKINGS[name] = ranking
    METRICS.append(name)


def candidates(scores: LayerScores, count: int, metric: str) -> dict[str, list[int]]:
    """Candidate sets of `count` layers, name -> positions: that of one metric, or for "auto" those of all rankings and
    the windows, without duplicates."""
    if metric != "auto":
        return {metric: RANKINGS[metric](scores, count)}
    named = {name: ranking(scores, count) for name, ranking in RANKINGS.items()} | windows(scores, count)
    distinct: dict[str, list[int]] = {}
    for name, removed in named.items():
        if removed not in distinct.values():
            distinct[name] = removed
    return distinct


def stems(scores: LayerScores, count: int, metric: str) -> dict[str, list[int]]:
    """Windows of `count` - 1 layers, name -> positions, to which the search adds one layer elsewhere; only for
    "auto"."""
    return windows(scores, count - 1) if metric == "auto" and count > 1 else {}


def finalists(found: Sequence[Candidate], corrected: bool) -> list[Candidate]:
    """The sets for which compensation is fitted: at most FINALISTS, with a loss less than FINALIST_MARGIN nats per
    token above the lowest.

    Compensation gains more at a single gap than at several gaps of the same number of layers, so it can change the
    order of the sets. Therefore the best set of each number of gaps comes first, then the second best of each.

    Args:
        found: All measured sets, lowest loss first.
        corrected: Whether compensation will be fitted; if not, only the best set is returned.
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
    """Number of runs of consecutive removed layers."""
    gone = set(removed)
    return sum(layer - 1 not in gone for layer in gone)


def decide(scores: LayerScores, winner: Candidate | None, removed: Sequence[int], why: str) -> list[LayerDecision]:
    """One decision per layer, with its score and the reason. The score is the gradient L1 norm, or the gate gradient if
    the gradients of the weights were not computed.

    Args:
        winner: The chosen set, whose ranking the reason names; None: the user named the layers.
        removed: Original indices of the removed layers.
        why: Why these layers are removed, in a few words.
    """
    gone = set(removed)
    ranking = winner.name if winner else "your choice"
    decisions = []
    for index, score in zip(scores.layers, scores.gradient or scores.gate, strict=True):
        reason = f"removed: {why} ({ranking})" if index in gone else "kept"
        decisions.append(LayerDecision(index=index, score=score, kept=index not in gone, reason=reason))
    return decisions
