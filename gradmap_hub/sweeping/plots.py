"""The figure of a sweep: quality and speed against size.

matplotlib is imported only when the figure is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.evaluation.speed import Ratio, Speed
from gradmap_hub.figures import GRID, KEPT, MUTED, REMOVED, SINGLE, legend, line_handle, log_ticks, save_plot
from gradmap_hub.sweeping.record import SweepPoint, SweepRecord

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sweep_plot(record: SweepRecord, path: Path) -> None:
    """Plot relative perplexity against the share of parameters removed, and relative speed below it, if measured.

    The perplexity axis is logarithmic, so that the chord that defines the knee is a straight line.
    """
    timed = [point for point in record.points if point.speed is not None]

    def draw(figure: Figure) -> None:
        heights = [1.6, 1] if timed else [1]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        _quality_panel(panels[0, 0], record)
        if timed:
            _speed_panel(panels[1, 0], timed)
            panels[0, 0].tick_params(axis="x", labelbottom=False)
        bottom = panels[-1, 0]
        shares = [100 * point.parameter_share for point in record.points]
        bottom.set_xticks([0, *shares], ["0", *(f"{share:.1f}" for share in shares)])
        bottom.set_xlim(-0.03 * shares[-1], 1.06 * shares[-1])
        bottom.set_xlabel("parameters removed (%)")

    save_plot(draw, path, height=8.4 if timed else 5.6)


def _quality_panel(axes: Axes, record: SweepRecord) -> None:
    from matplotlib.ticker import NullLocator

    points = record.points
    x = [0.0, *(100 * point.parameter_share for point in points)]
    y = [1.0, *(point.perplexity for point in points)]
    texts = [[1.0, *(point.evaluation.texts[index].compensated / point.evaluation.texts[index].original
                     for point in points)] for index in range(len(points[0].evaluation.texts))]  # fmt: skip
    for values in texts if len(texts) > 1 else []:
        axes.plot(x, values, color=SINGLE, linewidth=1.4, zorder=1)
    errors = [[0.0, *(max(0.0, point.perplexity - point.interval[0]) for point in points)],
              [0.0, *(max(0.0, point.interval[1] - point.perplexity) for point in points)]]  # fmt: skip
    axes.errorbar(x, y, yerr=errors, color=KEPT, marker="o", markersize=7, linewidth=2.2, capsize=5, zorder=3)
    axes.set_yscale("log")
    every = [*y, *(value for values in texts for value in values), *(end for p in points for end in p.interval)]
    low, high = min(every), max(every)
    axes.set_ylim(low / (high / low) ** 0.05 / 1.01, high * (high / low) ** 0.22 * 1.02)
    axes.set_yticks(log_ticks(*axes.get_ylim()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("\u00d7{x:g}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_ylabel("perplexity, as a multiple of\nthe original's (log scale)")
    handles = [line_handle("all texts, with 95 % interval", KEPT, marker="o")]
    if len(texts) > 1:
        handles.append(line_handle("single texts", SINGLE, width=1.4))
    knee = record.recommendation.knee
    at = next((point for point in points if knee is not None and knee in point.ratios), None)
    if at is not None:
        axes.plot([x[0], x[-1]], [y[0], y[-1]], color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=2)
        handles.append(line_handle("chord to the largest ratio", MUTED, width=1.2, style=(0, (5, 4))))
    _mark_points(axes, record, at)
    axes.set_title(f"{record.base.name.rpartition('/')[2]}: quality and size")
    legend(axes, handles)


def _mark_points(axes: Axes, record: SweepRecord, knee: SweepPoint | None) -> None:
    """Draw a ring around the knee, and around the recommended point if it differs. The labels are at the top, where a
    rising curve leaves room."""
    ratio = record.recommendation.ratio
    chosen = next((point for point in record.points if ratio is not None and ratio in point.ratios), None)
    marks = {id(point): (point, label) for point, label in ((chosen, "recommended"), (knee, "knee")) if point}
    for row, (point, label) in enumerate(marks.values()):
        x = 100 * point.parameter_share
        axes.plot([x], [point.perplexity], marker="o", markersize=15, markerfacecolor="none",
                  markeredgecolor=REMOVED, markeredgewidth=2.2, linestyle="none", zorder=4)  # fmt: skip
        axes.axvline(x, color=REMOVED, linewidth=1.2, linestyle=":", zorder=1)
        left_of = point.parameter_share > 0.4 * record.points[-1].parameter_share
        axes.annotate(
            f"{label}: ratio {point.ratios[0]:g}, \u00d7{point.perplexity:.2f}",
            (x, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(-8 if left_of else 8, -22 * row),
            textcoords="offset points", color=REMOVED, fontweight="bold", va="top",
            ha="right" if left_of else "left", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=5,
        )  # fmt: skip


def _speed_panel(axes: Axes, points: Sequence[SweepPoint]) -> None:
    def line(rate_of: Callable[[Speed], Ratio], label: str, colour: str, marker: str, shift: float) -> Artist:
        rates = [rate_of(point.speed) for point in points if point.speed is not None]
        x = [0.0, *(100 * point.parameter_share + shift for point in points)]
        y = [1.0, *(rate.ratio for rate in rates)]
        errors = [[0.0, *(rate.ratio - rate.spread[0] for rate in rates)],
                  [0.0, *(rate.spread[1] - rate.ratio for rate in rates)]]  # fmt: skip
        axes.errorbar(x, y, yerr=errors, color=colour, marker=marker, markersize=7, linewidth=2.0, capsize=4)
        return line_handle(label, colour, marker=marker)

    apart = 0.7 * points[-1].parameter_share  # the error bars of the two must not overlap
    prefill = line(lambda speed: speed.prefill, "prefill", KEPT, "o", -apart)
    decode = line(lambda speed: speed.decode, "decode, with range of the rounds", REMOVED, "s", apart)
    axes.set_ylabel("speed, as a multiple\nof the original's")
    axes.yaxis.set_major_formatter("\u00d7{x:.2f}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    legend(axes, [prefill, decode])
