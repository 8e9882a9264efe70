"""The figure of `inspect`: all scores of all layers, and the layers that would be removed.

matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.figures import EMPTY, KEPT, LOG_RANGE, REMOVED, layer_axis, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradmap_hub.pruning.scores import LayerScores

# Heights in inches: a panel of scores, the map of blocks, a row of the strip below.
_PANEL, _MAP, _STRIP_ROW = 1.75, 3.0, 0.34
# Layers of the largest block in the map.
_LARGEST_BLOCK = 12


def inspect_plot(
    scores: LayerScores, shift_by_layer: Sequence[float] | None, choices: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Draw all scores of all layers, the cost of removing each block of them, and, below, one strip per ratio with the
    layers that would be removed.

    Layers that would be removed at any ratio are shaded in all panels, darker if more ratios remove them.

    Args:
        shift_by_layer: Relative, such as `scores.shift`; NaN where unknown. None: no panel of shifts.
        choices: Label of a ratio, such as "10%" -> layers that it would remove.
        path: The PNG file to write.
    """
    measures = [
        ("gradient of the layer's gate, as a share of the highest", _shares(scores.gate)),
        ("gradient L1 norm, as a share of the highest", _shares(scores.gradient)),
        ("|W dL/dW|, as a share of the highest", _shares(scores.taylor)),
        ("block influence, 1 - cosine of input and output", list(scores.influence)),
    ]
    if shift_by_layer is not None:
        measures.append(("shift of the mean hidden state by the layer (%)", [100 * value for value in shift_by_layer]))
    strip = _STRIP_ROW * len(choices)

    def draw(figure: Figure) -> None:
        heights = [_PANEL] * len(measures) + [_MAP] + ([strip] if choices else [])
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, values) in zip(panels, measures, strict=False):
            for layers in choices.values():
                for layer in layers:
                    axes.axvspan(layer - 0.5, layer + 0.5, facecolor=REMOVED, alpha=0.09, linewidth=0)
            _score_bars(axes, title, scores.layers, values)
        _block_map(panels[len(measures)], scores)
        if choices:
            _choice_strip(panels[-1], scores.layers, choices)
        for axes in panels[:-1]:
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
        figure.suptitle(
            "What each layer contributes, and which layers would go",
            x=0.012, ha="left", fontsize=18, fontweight="bold",
        )  # fmt: skip

    save_plot(draw, path, height=1.35 + _PANEL * len(measures) + _MAP + strip)


def _shares(values: Sequence[float]) -> list[float]:
    """Each value divided by the highest."""
    highest = max(values)
    return [value / highest if highest else 0.0 for value in values]


def _score_bars(axes: Axes, title: str, layers: Sequence[int], values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    axes.bar(layers, values, width=0.78, color=KEPT)
    low, high = min(finite), max(finite)
    if low > 0 and high / low > LOG_RANGE:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.08)
        # At least two labelled ticks, but not so many that they overlap.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 1000 else (1.0,), numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        title += " (log scale)"
    else:
        axes.set_ylim(min(0.0, low * 1.1), max(0.0, high * 1.08) or 1.0)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title, fontsize=14, fontweight="normal", pad=6)
    layer_axis(axes, max(layers) + 1)


def _block_map(axes: Axes, scores: LayerScores) -> None:
    """A cell per block of layers, by its first layer and its number of layers: darker blocks cost less to remove."""
    from matplotlib.colors import LogNorm

    count = len(scores.layers)
    sizes = range(1, min(_LARGEST_BLOCK, count) + 1)
    costs = [
        [scores.cost[first][first + size] if first + size <= count else math.nan for first in range(count)]
        for size in sizes
    ]
    known = [cost for row in costs for cost in row if cost > 0 and math.isfinite(cost)]
    if known:
        edges = [scores.layers[0] - 0.5, *(layer + 0.5 for layer in scores.layers)]
        axes.pcolormesh(
            edges, [size - 0.5 for size in (*sizes, len(sizes) + 1)], costs, cmap="Blues_r",
            norm=LogNorm(min(known), max(known)), edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    axes.set_title(
        "cost of removing a block, by its first layer and length (log scale, darker is cheaper)",
        fontsize=14, fontweight="normal", pad=6,
    )  # fmt: skip
    axes.set_ylim(0.5, len(sizes) + 0.5)
    axes.set_yticks([size for size in sizes if size == 1 or size % 4 == 0])
    axes.grid(visible=False)
    layer_axis(axes, max(scores.layers) + 1)


def _choice_strip(axes: Axes, layers: Sequence[int], choices: Mapping[str, Sequence[int]]) -> None:
    """One row of cells per choice; the cells of removed layers are filled."""
    for row, going in enumerate(choices.values()):
        for gone in (False, True):
            cells = [layer for layer in layers if (layer in going) == gone]
            colour, hatch = (REMOVED, "///") if gone else (EMPTY, "")
            axes.bar(
                cells, 0.78, bottom=row - 0.39, width=0.78, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
    axes.set_title("would go, by share of layers removed", fontsize=14, fontweight="normal", pad=6)
    axes.set_yticks(range(len(choices)), list(choices))
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    layer_axis(axes, max(layers) + 1)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
