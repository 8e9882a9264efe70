"""Quality against time: one point per row of the table, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import ALONE, DEFAULT, OURS
from benchmarks.table import Row

# Selections that compute nothing still need a place on a logarithmic axis.
_LEAST_SECONDS = 0.1


def quality_time(rows: Sequence[Row], count: int, path: Path) -> None:
    """Seconds against mean perplexity of the rows that remove `count` layers; random is left out (it would stretch
    the axis and costs nothing)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.count == count and row.variant != ALONE and not row.method.startswith("random")]
    figure, axes = pyplot.subplots(figsize=(11, 7), dpi=120)
    axes.set_xscale("log")
    axes.set_yscale("log")
    placed: list[tuple[float, float, Row]] = []
    for row in shown:
        seconds = max(row.seconds or 0.0, _LEAST_SECONDS)
        ours = row.method in OURS
        axes.scatter(
            seconds,
            row.mean,
            s=110 if row.method == DEFAULT else 45,
            marker="*" if row.method == DEFAULT else "o" if row.variant != "+ our stage 2" else "s",
            color="#c8102e" if ours else "#3b6ea5" if row.variant != "+ our stage 2" else "#7fa7cf",
            zorder=3,
        )
        placed.append((seconds, row.mean, row))
    for row in rows:
        if row.count == 0:
            axes.axhline(row.mean, color="grey", linestyle=":", linewidth=1)
            axes.annotate("dense", (0.005, row.mean), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.margins(0.12)
    figure.canvas.draw()
    _label(axes, placed)
    axes.set_xlabel("seconds, selection and compensation")
    axes.set_ylabel("perplexity, geometric mean over the held-out texts")
    axes.set_title(f"{count} layers removed: quality against time (lower left is better)")
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _label(axes: object, placed: Sequence[tuple[float, float, Row]]) -> None:
    """Labels at the first of several offsets where they hit neither another label nor a point."""
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

    assert isinstance(axes, Axes)
    renderer = axes.figure.canvas.get_renderer()  # pyright: ignore
    taken: list[Bbox] = []
    for seconds, mean, _ in placed:
        x, y = axes.transData.transform((seconds, mean))
        taken.append(Bbox.from_bounds(x - 5, y - 5, 10, 10))
    offsets = [(side * 8, step * 9) for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6) for side in (1, -1)]
    for seconds, mean, row in sorted(placed, key=lambda entry: -entry[1]):
        for position, (dx, dy) in enumerate(offsets):
            label = axes.annotate(
                row.label,
                (seconds, mean),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=7.5,
                color="#c8102e" if row.method in OURS else "black",
                fontweight="bold" if row.method == DEFAULT else "normal",
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.4} if abs(dy) > 9 else None,
            )
            # The box of the words alone: that of an annotation includes its arrow, which may cross anything.
            box = _text_box(label, renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if (inside and not any(box.overlaps(other) for other in taken)) or position == len(offsets) - 1:
                taken.append(box)
                break
            label.remove()


def _text_box(label: object, renderer: object) -> Any:
    from matplotlib.text import Annotation, Text

    assert isinstance(label, Annotation)
    label.update_positions(renderer)  # pyright: ignore
    return Text.get_window_extent(label, renderer)  # pyright: ignore
