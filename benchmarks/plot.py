"""Plot of quality against time: one point per table row, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import ALONE, DEFAULT, OURS, STAGE_2
from benchmarks.table import Row

# A perplexity above this multiple of the dense model's has collapsed; plotting it would squeeze all other points.
_COLLAPSED = 6.0
# Data points closer than this (in 1/72 inch) share a label.
_CLOSE = 11.0
_RED, _BLUE, _LIGHT = "#c8102e", "#3b6ea5", "#7fa7cf"


def quality_time(rows: Sequence[Row], count: int, path: Path) -> None:
    """Plot seconds against mean perplexity of the methods that remove `count` layers, numbered from the best.

    The key beside the plot also lists collapsed methods. Random is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in rows if row.count == count and row.variant != ALONE and not row.method.startswith("random")]
    shown.sort(key=lambda row: row.mean)
    dense = min((row.mean for row in rows if row.count == 0), default=None)
    limit = _COLLAPSED * (dense if dense is not None else shown[0].mean)
    # A logarithmic axis cannot show zero seconds.
    placed = [row for row in shown if row.mean <= limit and (row.seconds or 0) > 0]
    figure, (axes, key) = pyplot.subplots(1, 2, figsize=(11.5, 5.4), dpi=120, width_ratios=(2.1, 1))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in placed:
        axes.scatter(
            row.seconds or 0,
            row.mean,
            s=150 if row.method == DEFAULT else 42,
            marker="*" if row.method == DEFAULT else "s" if row.variant == STAGE_2 else "o",
            color=_colour(row),
            zorder=3,
        )
    if dense is not None:
        axes.axhline(dense, color="grey", linestyle=":", linewidth=1)
        axes.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.margins(0.1)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("seconds, selection and compensation")
    axes.set_ylabel("perplexity, geometric mean over the held-out texts")
    axes.set_title(f"{count} layers removed: quality against time (lower left is better)", fontsize=11)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.canvas.draw()
    _number(axes, placed)
    _key(key, shown, placed)
    figure.savefig(path)
    pyplot.close(figure)


def _colour(row: Row) -> str:
    return _RED if row.method in OURS else _LIGHT if row.variant == STAGE_2 else _BLUE


def _number(axes: Any, placed: Sequence[Row]) -> None:
    """Write numbers beside the points; points that lie together share a label."""
    scale = 72 / axes.figure.dpi
    groups: list[tuple[float, float, list[int]]] = []
    for number, row in enumerate(placed, start=1):
        x, y = axes.transData.transform((row.seconds, row.mean)) * scale
        near = next((group for group in groups if abs(group[0] - x) < _CLOSE and abs(group[1] - y) < _CLOSE), None)
        if near is None:
            groups.append((x, y, [number]))
        else:
            near[2].append(number)
    for _, _, numbers in groups:
        last = max((placed[number - 1] for number in numbers), key=lambda row: row.seconds or 0)
        axes.annotate(
            ", ".join(map(str, numbers)),
            (last.seconds, last.mean),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )


def _key(axes: Any, shown: Sequence[Row], placed: Sequence[Row]) -> None:
    """List every row with its number; rows that are not on the chart have no number."""
    axes.axis("off")
    lines = [(f"{number}", row) for number, row in enumerate(placed, start=1)]
    lines += [("", row) for row in shown if row not in placed]
    for position, (number, row) in enumerate(lines):
        y = 1 - position / max(len(lines), 16)
        weight = "bold" if row.method == DEFAULT else "normal"
        where = {"transform": axes.transAxes, "fontsize": 8, "va": "top", "color": "black", "fontweight": weight}
        axes.text(0.04, y, number, ha="right", **where)
        axes.text(0.08, y, row.label, **{**where, "color": _RED if row.method in OURS else "black"})
        axes.text(1.0, y, f"{row.mean:.1f}" if row.mean < 1000 else f"{row.mean:.0e}", ha="right", **where)
