"""The style of our figures, and helpers to draw them; each package draws its own figures.

matplotlib is imported only when a figure is drawn: the import takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours: distinct under the common colour-vision deficiencies; removed layers are hatched as well.
KEPT, REMOVED, INK, MUTED, GRID = "#0072B2", "#D55E00", "#24292f", "#57606a", "#d8dee4"
REMOVED_AREA, EMPTY, SINGLE = "#fae7dc", "#eef1f4", "#9fb8cc"
_PLOT_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 14,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 18,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 32,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "hatch.linewidth": 1.5,
    "legend.fontsize": 13,
    "legend.frameon": False,
}
# Beyond this ratio of highest to lowest score, a linear axis hides the differences between the low ones.
LOG_RANGE = 15.0


def save_plot(draw: Callable[[Figure], None], path: Path, height: float = 5.2) -> None:
    """Draw a figure with `draw`, 12 inches wide and `height` inches high, and save it as PNG. The same drawing gives
    the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure(figsize=(12, height), dpi=100, facecolor="white")
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.16))
        FigureCanvasAgg(figure)
        draw(figure)
        # The file would contain the version of matplotlib; without it the bytes depend only on the pixels.
        figure.savefig(path, format="png", metadata={"Software": None})


def layer_axis(axes: Axes, count: int) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if count / step <= 34)
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.7, count - 0.3)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("decoder layer (index in the original model)")
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def patch(label: str, colour: str, hatch: str = "") -> Artist:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)


def line_handle(label: str, colour: str, *, marker: str = "", width: float = 2.2, style: Any = "-") -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=width, linestyle=style, label=label)


def legend(axes: Axes, handles: Sequence[Artist]) -> None:
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.008, 1.0), ncols=len(handles), columnspacing=1.6,
        handlelength=1.6, borderaxespad=0.1,
    )  # fmt: skip


def log_ticks(low: float, high: float) -> list[float]:
    """Round tick values from `low` to `high` for a logarithmic axis, usually two to nine."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)) if high > 2.5 * low else ():
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [tick for tick in ticks if low <= tick <= high]
        if 3 <= len(found) <= 9:
            return found
    if high > 2.5 * low:  # several decades
        tens = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
        return tens[:: math.ceil(len(tens) / 8)]
    step = next(
        (step for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 8),
        (high - low) / 4,
    )
    return [round(number * step, 6) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
