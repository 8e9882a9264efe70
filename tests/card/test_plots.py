"""The figures of `inspect` and `sweep`, and the table of `inspect`; the card's are looked at in test_card.py."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from gradmap_hub.cli.inspect import inspect_table
from gradmap_hub.evaluation.speed import Ratio, Speed
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.pruning.candidates import lowest
from gradmap_hub.pruning.plots import inspect_plot
from gradmap_hub.pruning.scores import LayerScores
from gradmap_hub.record import Base, CalibrationRecord, CompensationRecord, EvaluationRecord, TextPerplexity
from gradmap_hub.sweeping.knee import recommend
from gradmap_hub.sweeping.plots import sweep_plot
from gradmap_hub.sweeping.record import SweepPoint, SweepRecord

COUNT = 30
GRADIENT = [9000 / (1 + layer) + 40 * abs(layer - 15) + 700 for layer in range(COUNT)]
INFLUENCE = [0.02 + 0.3 * (layer in (0, COUNT - 1)) + 0.001 * abs(layer - 14) for layer in range(COUNT)]
CHOICES = {f"{percent}%": lowest(INFLUENCE, round(COUNT * percent / 100)) for percent in (10, 20, 30)}


def make_scores(gradient: Sequence[float] = GRADIENT, influence: Sequence[float] = INFLUENCE) -> LayerScores:
    count = len(gradient)
    distance = [[0.0] * (count + 1) for _ in range(count + 1)]
    for layer, value in enumerate(influence):
        distance[layer][layer + 1] = value
    return LayerScores(
        layers=list(range(count)),
        gradient=list(gradient),
        taylor=[value / 50 for value in gradient],
        distance=distance,
        shift=[0.1] * count,
        gate=[value / 9 for value in gradient],
        cost=distance,
        loss=3.0,
    )


def size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.mark.slow
def test_the_figure_grows_with_what_it_shows_and_is_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "shift.png", "plain.png")]
    scores = make_scores()
    inspect_plot(scores, None, CHOICES, paths[0])
    inspect_plot(scores, None, CHOICES, paths[1])
    inspect_plot(scores, [math.nan if layer < 3 else 0.2 for layer in range(COUNT)], CHOICES, paths[2])
    inspect_plot(scores, None, {}, paths[3])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    sizes = [size_of(path) for path in paths]
    assert {width for width, _ in sizes} == {1200}
    assert sizes[3][1] < sizes[0][1] < sizes[2][1]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 1e9], [-0.1, 0.4], [1.0]])
def test_extreme_scores_are_drawn(values: list[float], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    inspect_plot(make_scores(values, values), None, {"50%": [0]}, path)
    assert path.stat().st_size


def shown(choices: dict[str, list[int]], model: str = "m") -> list[str]:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(inspect_table(model, make_scores(), choices))
    return console.export_text().splitlines()


def test_the_table_says_when_a_layer_is_removed() -> None:
    lines = shown(CHOICES, "org/[red]model")
    assert "org/[red]model" in lines[0]
    rows = {int(line.split("│")[1]): [cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line}
    assert len(rows) == COUNT
    scores = [f"{GRADIENT[14] / share:.4g}" for share in (9, 1, 50)]
    assert rows[14] == ["14", *scores, "0.0200", "10%, 20%, 30%"]
    assert rows[0][-1] == "" and rows[10][-1] == "30%"


def test_the_table_without_choices_has_scores_only() -> None:
    assert "removed at" not in "".join(shown({})) and "removed at" in "".join(shown(CHOICES))


def make_sweep(perplexities: Sequence[float], *, timed: bool = True, texts: int = 2) -> SweepRecord:
    """Two layers of thirty more at every point."""
    points = []
    for number, value in enumerate(perplexities, start=1):
        measured = [
            TextPerplexity(f"t{text}", "", 4, 128, 32, "", 9.0, 12.0 * value, 9.0 * value**text, [1.0, 2.0])
            for text in range(1, texts + 1)
        ]
        rate = Ratio(10.0, 10.0 + number, 1 + number / 10, [1 + number / 20, 1 + number / 5])
        points.append(
            SweepPoint(
                [number / 15], list(range(2 * number)), BeforeAfter(30, 30 - 2 * number),
                BeforeAfter(100, 100 - 5 * number), BeforeAfter(400, 400 - 20 * number), "gradient",
                value, [value / 1.01, value * 1.01], value, EvaluationRecord("perplexity", 9.0, 9.0, 9.0, "", measured),
                [], CompensationRecord(False), None, Speed(rate, rate, 8, 4, 5, 1, "cpu", "float32") if timed else None,
            )
        )  # fmt: skip
    return SweepRecord(
        1, "", "", Base("org/model"), [], {}, CalibrationRecord("", 4, 128, 32, ""), points, recommend(points)
    )


def test_the_sweep_is_drawn_the_same_each_time_and_without_speed_lower(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "untimed.png", "straight.png")]
    record = make_sweep([1.05, 1.1, 1.9])
    assert record.recommendation.knee == 2 / 15
    sweep_plot(record, paths[0])
    sweep_plot(record, paths[1])
    sweep_plot(make_sweep([1.05, 1.1, 1.9], timed=False), paths[2])
    sweep_plot(make_sweep([1.2, 1.44, 1.9]), paths[3])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[3].read_bytes()
    assert [size_of(path) for path in paths] == [(1200, 840), (1200, 840), (1200, 560), (1200, 840)]


@pytest.mark.parametrize("values", [[1.0], [0.97, 1.0], [1.0001, 1.0002, 1.0003], [3.0, 1e4, 1e12]])
def test_extreme_sweeps_are_drawn(values: list[float], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    sweep_plot(make_sweep(values, texts=1), path)
    assert path.stat().st_size


@pytest.mark.parametrize("top", [1.0005, 1.01, 1.3, 2.0, 2.6, 9.0, 70.0, 1e4, 1e12])
def test_ticks_are_few_and_within_the_axis(top: float) -> None:
    from gradmap_hub.figures import log_ticks

    ticks = log_ticks(0.99, top)
    assert 2 <= len(ticks) <= 9 and all(0.99 <= tick <= top for tick in ticks)
    assert ticks == sorted(set(ticks)) and all(float(f"{tick:.4g}") == tick for tick in ticks)
    assert 1.0 in ticks
