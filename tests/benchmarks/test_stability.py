"""The stability benchmark on a tiny model: every reading is what its name says, and nothing of the model changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stability import Sums, choices, plot
from gradmap_hub.pruning.scoring import score_layers

LAYERS, TOKENS, COUNT = 6, 24, 2


@pytest.fixture(scope="module")
def decoder(model_of: Callable[..., Any], decoder_of: Callable[..., Any]) -> Any:
    return decoder_of(model_of("llama", num_hidden_layers=LAYERS), TOKENS)


def test_readings(decoder: Any, random_rows: Callable[..., Any]) -> None:
    rows = random_rows(3, TOKENS)
    sums = Sums(decoder)
    for row in rows.split(1):
        sums.add(row)
    found = sums.readings()
    together = score_layers(decoder, rows)
    assert found["gradient, |.| per row"] == pytest.approx(together.gradient, rel=1e-5)
    assert found["|W dL/dW| per row"] == pytest.approx(together.taylor, rel=1e-5)
    assert found["block influence"] == pytest.approx([3 * value for value in together.influence], rel=1e-5)
    assert sums.windows(COUNT) == pytest.approx([3 * value for value in together.windows(COUNT)], rel=1e-5)
    assert sum(found["gradient, each row's sum 1"]) == pytest.approx(3)
    # plain autograd, all rows' losses summed before the absolute value
    model = decoder.model
    model.requires_grad_(True)
    sum(model(input_ids=row, labels=row, use_cache=False).loss for row in rows.split(1)).backward()
    expected = [
        sum(float(p.grad.abs().sum()) for p in layer.parameters() if p.ndim >= 2) for layer in model.model.layers
    ]
    model.zero_grad()
    assert found["gradient, |.| of the sum"] == pytest.approx(expected, rel=1e-4)
    assert "backward" not in vars(decoder)


def test_choices_depend_on_the_first_rows_alone(decoder: Any, random_rows: Callable[..., Any], tmp_path: Path) -> None:
    rows = random_rows(4, TOKENS)
    found = choices(decoder, rows, [1, 2, 4], COUNT)
    assert {number for _, number in found} == {1, 2, 4} and len(found) == 3 * 7
    fewer = choices(decoder, rows[:2], [1, 2], COUNT)
    assert all(found[key] == removed for key, removed in fewer.items())
    assert all(len(removed) == COUNT and removed == sorted(removed) for removed in found.values())
    results = [
        {"text": text, "reading": reading, "rows": number, "removed": removed, "perplexity": 10.0 * number}
        for text in ("one", "another")
        for (reading, number), removed in found.items()
    ]
    plot(results, LAYERS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
