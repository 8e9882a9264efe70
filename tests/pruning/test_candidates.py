"""Numbers in, decisions out: rankings, candidate sets, how many layers go, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from gradmap_hub.config import METRICS, PruneConfig, help_of, paper_preset
from gradmap_hub.errors import UsageError
from gradmap_hub.pruning.candidates import (
    RANKINGS,
    candidates,
    cheapest_blocks,
    decide,
    finalists,
    gaps,
    lowest,
    lowest_window,
    register,
    stems,
)
from gradmap_hub.pruning.scores import LayerScores
from gradmap_hub.record import Candidate


def distances(influence: list[float], windows: list[float]) -> list[list[float]]:
    """A matrix of distances with these between neighbours and these across two layers."""
    size = len(influence) + 1
    matrix = [[0.0] * size for _ in range(size)]
    for start, value in enumerate(influence):
        matrix[start][start + 1] = value
    for start, value in enumerate(windows):
        matrix[start][start + 2] = value
    return matrix


INFLUENCE = [0.9, 0.4, 0.1, 0.5, 0.6, 0.2]
#                                 0    1    2    3    4    5
SCORES = LayerScores(
    layers=[0, 1, 2, 3, 4, 5],
    gradient=[9.0, 2.0, 7.0, 3.0, 4.0, 8.0],
    taylor=[9.0, 1.0, 8.0, 2.0, 3.0, 7.0],
    distance=distances(INFLUENCE, [0.9, 0.8, 0.7, 0.3, 0.5]),
    shift=[0.1] * 6,
    gate=[5.0, 4.0, 6.0, 1.0, 2.0, 3.0],
    cost=[[0.0 if end <= start else end - start + start / 10 for end in range(7)] for start in range(7)],
    loss=3.0,
    rows=4,
)


@pytest.mark.parametrize("most", [None, 1, 2])
def test_cheapest_blocks_are_the_cheapest_of_all_sets(most: int | None) -> None:
    draw = random.Random(0)
    for layers in (1, 2, 5, 8):
        for count in range(1, layers + 1):
            cost = [[draw.random() * (end - start) ** 1.5 for end in range(layers + 1)] for start in range(layers + 1)]

            def total(removed: Sequence[int], cost: list[list[float]] = cost) -> float:
                starts = [layer for layer in removed if layer - 1 not in removed]
                ends = [layer + 1 for layer in removed if layer + 1 not in removed]
                return sum(cost[start][end] for start, end in zip(starts, ends, strict=True))

            every = [each for each in itertools.combinations(range(layers), count) if gaps(each) <= (most or layers)]
            assert cheapest_blocks(cost, count, most) == list(min(every, key=total))


def test_lowest() -> None:
    assert lowest([3.0, 1.0, 2.0, 0.5], 2) == [1, 3]
    assert lowest([1.0, 1.0, 1.0, 1.0], 2) == [0, 1]  # ties: the earlier one
    assert lowest([-1.0, -3.0, 0.0], 1) == [1]
    assert lowest([2.0, 1.0], 2) == [0, 1]


def test_lowest_window() -> None:
    assert lowest_window([5.0, 1.0, 9.0, 2.0, 2.0, 4.0], 2) == [3, 4]
    assert lowest_window([1.0, 1.0, 1.0], 2) == [0, 1]
    assert lowest_window([3.0, 2.0, 1.0], 1) == [2]
    assert lowest_window([3.0, 2.0, 1.0], 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("metric", "removed"),
    [
        ("gradmap", [0, 1]),
        ("gate", [3, 4]),
        ("gradient", [1, 3]),
        ("taylor", [1, 3]),
        ("block-influence", [2, 5]),
        ("gradient-window", [3, 4]),
        ("taylor-window", [3, 4]),
        ("cosine-window", [3, 4]),
    ],
)
def test_one_metric_gives_one_candidate(metric: str, removed: list[int]) -> None:
    assert candidates(SCORES, 2, metric) == {metric: removed}


def test_every_ranking_can_be_selected() -> None:
    assert ["auto", *RANKINGS] == METRICS
    assert all(PruneConfig(layers=1, metric=name).metric == name for name in METRICS)
    assert all(name in help_of(PruneConfig, "metric") for name in METRICS)


def test_a_name_is_registered_once() -> None:
    for taken in METRICS:
        with pytest.raises(ValueError, match=f"the metric '{taken}' already exists"):
            register(taken, lambda _scores, count: list(range(count)))
    assert ["auto", *RANKINGS] == METRICS


def test_auto_gives_every_distinct_set_once() -> None:
    found = candidates(SCORES, 2, "auto")
    assert found == {
        "gradmap": [0, 1],
        "gate": [3, 4],  # the gradient window too
        "gradient": [1, 3],
        "block-influence": [2, 5],
        "cosine-window, second best": [4, 5],
        "cosine-window, third best": [2, 3],
    }
    other = dataclasses.replace(
        SCORES, taylor=[9.0, 8.0, 7.0, 1.0, 9.0, 1.5], distance=distances(INFLUENCE, [0.1, 0.8, 0.7, 0.3, 0.5])
    )
    assert candidates(other, 2, "auto") == {
        "gradmap": [0, 1],  # the cosine window too
        "gate": [3, 4],
        "gradient": [1, 3],
        "taylor": [3, 5],
        "block-influence": [2, 5],
        "taylor-window": [2, 3],
        "cosine-window, third best": [4, 5],  # the second best is the gradient window
    }


def test_stems_are_windows_of_one_layer_less() -> None:
    found = stems(SCORES, 3, "auto")
    assert list(found.values()) == [list(range(at, at + 2)) for at in (3, 4, 2)]
    assert stems(SCORES, 1, "auto") == stems(SCORES, 3, "gradient") == {}


def test_finalists_are_the_best_of_each_number_of_gaps_then_the_next_best() -> None:
    sets = {"a": [1, 5], "b": [2, 6], "c": [3, 7], "d": [1, 2], "e": [3, 4]}
    found = [Candidate(name, removed, 3.0 + 0.05 * at) for at, (name, removed) in enumerate(sets.items())]
    assert [c.name for c in finalists(found, True)] == ["a", "d", "b"]
    assert [c.name for c in finalists([found[0], Candidate("far", [2, 3], 3.3)], True)] == ["a"]
    assert [c.name for c in finalists(found, False)] == ["a"]  # nothing is corrected, so nothing can change


@pytest.mark.parametrize(("removed", "count"), [([], 0), ([3], 1), ([4, 3], 1), ([1, 3, 4, 8], 3)])
def test_gaps_are_runs_of_missing_layers(removed: list[int], count: int) -> None:
    assert gaps(removed) == count


def test_decisions_say_score_fate_and_reason() -> None:
    winner = Candidate("taylor", [1, 3], 2.5)
    decisions = decide(SCORES, winner, [1, 3], "lowest held-out loss")
    assert [d.index for d in decisions] == [0, 1, 2, 3, 4, 5]
    assert [d.score for d in decisions] == SCORES.gradient
    assert [d.index for d in decisions if not d.kept] == [1, 3]
    assert "taylor" in decisions[1].reason and "lowest held-out loss" in decisions[1].reason
    assert decisions[0].reason == "kept"
    assert "your choice" in decide(SCORES, None, [0], "named")[0].reason


@pytest.mark.parametrize(
    ("ratio", "layers", "removed"),
    [
        (0.25, 30, 8),  # 7.5: half goes up
        (0.25, 32, 8),
        (0.25, 28, 7),
        (0.25, 10, 3),  # 2.5, where Python's round() would give 2
        (0.15, 10, 2),
        (0.1, 24, 2),
        (0.001, 30, 1),
        (1e-300, 30, 1),
        (0.99, 30, 29),
        (0.999999, 2, 1),
        (0.5, 3, 2),
        (0.5, 2, 1),
    ],
)
def test_ratio_rounds_half_up_and_leaves_a_layer(ratio: float, layers: int, removed: int) -> None:
    assert PruneConfig(ratio=ratio).removals(layers) == removed


def test_layers_and_drop() -> None:
    assert PruneConfig(layers=7).removals(30) == 7
    assert PruneConfig(layers=29).removals(30) == 29
    assert PruneConfig(drop=(3, 1)).removals(4) == 2
    assert PruneConfig(drop=(0,)).removals(4) == 1
    for config, message in (
        (PruneConfig(layers=30), "Cannot remove 30 of 30"),
        (PruneConfig(layers=31), "Cannot remove 31 of 30"),
        (PruneConfig(drop=(3, 30)), "names layer 30; the model has 30 layers, 0 to 29"),
        (PruneConfig(drop=tuple(range(30))), "Cannot remove 30 of 30"),
    ):
        with pytest.raises(UsageError, match=message):
            config.removals(30)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.5, -0.25, 25.0])
def test_invalid_ratios(ratio: float) -> None:
    with pytest.raises(UsageError, match="--ratio"):
        PruneConfig(ratio=ratio)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.25, "layers": 3},
        {"ratio": 0.25, "drop": (1,)},
        {"layers": 2, "drop": (1, 2)},
        {"ratio": 0.25, "layers": 2, "drop": (1, 2)},
    ],
)
def test_exactly_one_way_to_say_how_much(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="exactly one of --ratio, --layers and --drop"):
        PruneConfig(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 0}, "--layers"),
        ({"layers": -1}, "--layers"),
        ({"drop": ()}, "--drop"),
        ({"drop": (-1,)}, "--drop"),
        ({"drop": (3, 3)}, "--drop"),
        ({"ratio": 0.2, "metric": "magic"}, "--metric"),
        ({"ratio": 0.2, "schedule": "twice"}, "--schedule"),
        ({"ratio": 0.2, "compensation": "lora"}, "--compensation"),
        ({"ratio": 0.2, "dtype": "int8"}, "--dtype"),
        ({"ratio": 0.2, "site": "last"}, "--site"),
        ({"ratio": 0.2, "samples": 3}, "--samples"),
        ({"ratio": 0.2, "seq_len": 8}, "--seq-len"),
        ({"ratio": 0.2, "eval_rows": 1}, "--eval-rows"),
        ({"ratio": 0.2, "seed": -1}, "--seed"),
        ({"ratio": 0.2, "calibration": ()}, "--calibration"),
    ],
)
def test_values_out_of_range_name_their_option(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        PruneConfig(**options)


def test_rows_for_scoring_and_selection() -> None:
    assert (PruneConfig(ratio=0.2, samples=4).scoring_rows, PruneConfig(ratio=0.2, samples=64).scoring_rows) == (4, 16)
    assert PruneConfig(ratio=0.2, samples=64).selection_rows == 16


def test_paper_preset_keeps_the_rest() -> None:
    config = paper_preset(PruneConfig(ratio=0.3, seed=5))
    assert (config.metric, config.compensation, config.site) == ("gradient", "projection", "largest-shift")
    assert (config.ratio, config.seed) == (0.3, 5)


def test_every_option_has_help() -> None:
    assert all(help_of(PruneConfig, entry.name) for entry in dataclasses.fields(PruneConfig))
    with pytest.raises(KeyError):
        help_of(PruneConfig, "nonsense")
