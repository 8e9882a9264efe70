"""The figure and the table of `inspect`; the card's figures are looked at in test_card.py."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from gradmap_hub.plots import inspect_plot
from gradmap_hub.scoring import LayerScores
from gradmap_hub.selection import lowest
from gradmap_hub.terminal import inspect_table

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
        loss=3.0,
    )


def size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image.size


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


def test_the_table_says_when_a_layer_goes() -> None:
    lines = shown(CHOICES, "org/[red]model")
    assert "org/[red]model" in lines[0]
    rows = {int(line.split("│")[1]): [cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line}
    assert len(rows) == COUNT
    assert rows[14] == ["14", f"{GRADIENT[14]:.4g}", f"{GRADIENT[14] / 50:.4g}", "0.0200", "10%, 20%, 30%"]
    assert rows[0][-1] == "" and rows[10][-1] == "30%"


def test_the_table_without_choices_has_scores_only() -> None:
    assert "goes at" not in "".join(shown({})) and "goes at" in "".join(shown(CHOICES))
