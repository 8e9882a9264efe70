"""Which ratio is recommended, from curves whose knee is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import CompensationRecord, EvaluationRecord
from gradmap_hub.sweeping.knee import knee_of, recommend
from gradmap_hub.sweeping.record import SweepPoint

LAYERS = 40


def curve(perplexities: Sequence[float], noise: float = 1.02, step: int = 4) -> list[SweepPoint]:
    """Points `step` layers apart; intervals from perplexity / noise to perplexity * noise."""
    return [
        SweepPoint(
            ratios=[number * step / LAYERS],
            removed=list(range(number * step)),
            layers=BeforeAfter(LAYERS, LAYERS - number * step),
            parameters=BeforeAfter(100, 100 - number * step),
            bytes=BeforeAfter(400, 400 - 4 * number * step),
            metric="gradient",
            perplexity=value,
            interval=[value / noise, value * noise],
            uncorrected=value,
            evaluation=EvaluationRecord("perplexity", 1.0, value, value, "text"),
            candidates=[],
            compensation=CompensationRecord(False),
        )
        for number, value in enumerate(perplexities, start=1)
    ]


def test_a_bend_is_found() -> None:
    """Loss grows by 0.05 a step up to 0.3, by 0.5 a step behind it."""
    points = curve([math.exp(value) for value in (0.05, 0.10, 0.15, 0.65, 1.15)])
    found, why = knee_of(points)
    assert found is points[2] and why.startswith("the knee")
    given = recommend(points)
    assert (given.ratio, given.knee, given.max_loss) == (0.3, 0.3, None)


def test_the_knee_is_that_of_the_logarithm() -> None:
    """Perplexity that doubles with every step is a straight line, though it bends as it stands."""
    points = curve([2.0, 4.0, 8.0, 16.0], noise=1.001)
    found, why = knee_of(points)
    assert found is None and why.startswith("no knee: at no ratio is the loss")
    assert recommend(points).ratio is None


def test_a_curve_that_bends_the_other_way_has_none() -> None:
    assert knee_of(curve([1.5, 1.8, 1.95, 2.0]))[0] is None


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_ratios_have_none(count: int) -> None:
    found, why = knee_of(curve([1.05, 1.6][:count]))
    assert found is None and "needs at least 3 ratios" in why


def test_a_bend_within_the_noise_is_none() -> None:
    values = [math.exp(value) for value in (0.30, 0.62, 1.0)]  # chord 0.333, 0.667, 1
    assert knee_of(curve(values, noise=1.01))[0] is not None
    assert knee_of(curve(values, noise=1.2))[0] is None


@pytest.mark.parametrize("interval", [[], [math.nan, math.nan], [1.0, math.inf], [0.0, 1.0]])
def test_points_without_an_interval_do_not_count(interval: list[float]) -> None:
    import dataclasses

    points = curve([1.05, 1.1, 1.9])
    points[1] = dataclasses.replace(points[1], interval=interval)
    assert "needs at least 3 ratios" in knee_of(points)[1]


@pytest.mark.parametrize(
    ("max_loss", "ratio"), [(5.0, 0.1), (4.99, None), (10.0, 0.2), (900.0, 0.4), (0.0, None), (39.0, 0.2)]
)
def test_a_bound_takes_the_largest_ratio_within_it(max_loss: float, ratio: float | None) -> None:
    given = recommend(curve([1.05, 1.1, 1.4, 5.0]), max_loss)
    assert given.ratio == ratio and given.knee == 0.3 and given.max_loss == max_loss
    assert f"{max_loss:g} %" in given.reason and given.knee_reason.startswith("the knee")


def test_a_bound_needs_no_three_ratios() -> None:
    given = recommend(curve([1.02]), 3)
    assert given.ratio == 0.1 and given.knee is None
