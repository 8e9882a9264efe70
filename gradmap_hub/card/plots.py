"""The figures: the two of the model card, and those of `inspect` and `sweep`.

matplotlib is imported when something is drawn: it takes most of a second, and no other command needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradmap_hub.pruning.scoring import LayerScores
    from gradmap_hub.sweep.record import Ratio, Speed, SweepPoint, SweepRecord

# Okabe-Ito colours: distinct under the common colour-vision deficiencies; removed layers are hatched as well.
_KEPT, _REMOVED, _INK, _MUTED, _GRID = "#0072B2", "#D55E00", "#24292f", "#57606a", "#d8dee4"
_REMOVED_AREA, _EMPTY, _SINGLE = "#fae7dc", "#eef1f4", "#9fb8cc"
_PLOT_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 14,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 18,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 32,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "hatch.linewidth": 1.5,
    "legend.fontsize": 13,
    "legend.frameon": False,
}
# Beyond this ratio of highest to lowest score, a linear axis hides the differences between the low ones.
_LOG_RANGE = 15.0
# Heights in inches: a panel of scores, a row of the strip below.
_PANEL, _STRIP_ROW = 1.75, 0.34


def layers_plot(record: RunRecord, figure: Figure) -> None:
    """One bar per decoder layer: its gradient score, and whether it went."""
    axes = figure.add_subplot()
    scores = [layer.score for layer in record.layers]
    indices = [layer.index for layer in record.layers]
    colours = [_KEPT if layer.kept else _REMOVED for layer in record.layers]
    bars = axes.bar(indices, scores, width=0.78, color=colours)
    for bar, layer in zip(bars, record.layers, strict=True):
        if not layer.kept:
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    low, high = min(scores), max(scores)
    if low > 0 and high / low > _LOG_RANGE:
        axes.set_yscale("log")
        span = high / low
        axes.set_ylim(low / span**0.12, high * span**0.25)
        scale = ", log scale"
    else:
        axes.set_ylim(min(0.0, low * 1.1), max(0.0, high * 1.22) or 1.0)
        axes.yaxis.set_major_formatter("{x:,.6g}")
        scale = ""
    removed = len(record.removed)
    share = removed / len(record.layers)
    axes.set_title(f"{removed} of {len(record.layers)} decoder layers removed ({share:.1%})")
    axes.set_ylabel(f"gradient score (L1 norm{scale})")
    _finish_layer_axis(axes, len(record.layers))
    marks = _mark_corrected(axes, record, dict(zip(indices, scores, strict=True)))
    _legend(axes, [_patch("kept", _KEPT), _patch("removed", _REMOVED, "///"), *marks])


def shift_plot(record: RunRecord, figure: Figure) -> None:
    """Relative mean shift after each kept layer, before any correction; removed layers as shaded gaps."""
    compensation = record.compensation
    axes = figure.add_subplot()
    percents = [100 * value for value in compensation.relative_shift]
    for index in record.removed:
        axes.axvspan(index - 0.5, index + 0.5, facecolor=_REMOVED, alpha=0.13, linewidth=0)
    axes.bar(compensation.shift_layers, percents, width=0.78, color=_KEPT)
    top = max(percents)
    axes.set_ylim(0, top * 1.22 or 1)
    gone = f"{len(record.removed)} layer{'s' if len(record.removed) > 1 else ''}"
    axes.set_title(f"With {gone} gone, the mean hidden state shifts by up to {top:.0f}%")
    axes.set_ylabel("relative mean shift (%)")
    _finish_layer_axis(axes, len(record.layers))
    marks = _mark_corrected(axes, record, dict(zip(compensation.shift_layers, percents, strict=True)))
    _legend(axes, [_patch("kept layer, before correction", _KEPT), _patch("removed layer", _REMOVED_AREA), *marks])


def inspect_plot(
    scores: LayerScores, shift_by_layer: Sequence[float] | None, choices: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Every score of every layer, and below a strip per ratio with the layers that would go.

    `shift_by_layer`: relative, such as `scores.shift`; not-a-number where there is none. `choices`: label such as "10%"
    -> layers. The layers that would go at any ratio are shaded throughout, the deeper the more ratios take them.
    """
    measures = [
        ("gradient L1 norm, as a share of the highest", _shares(scores.gradient)),
        ("|W dL/dW|, as a share of the highest", _shares(scores.taylor)),
        ("block influence, 1 - cosine of input and output", list(scores.influence)),
    ]
    if shift_by_layer is not None:
        measures.append(("shift of the mean hidden state by the layer (%)", [100 * value for value in shift_by_layer]))
    strip = _STRIP_ROW * len(choices)

    def draw(figure: Figure) -> None:
        heights = [_PANEL] * len(measures) + ([strip] if choices else [])
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, values) in zip(panels, measures, strict=False):
            for layers in choices.values():
                for layer in layers:
                    axes.axvspan(layer - 0.5, layer + 0.5, facecolor=_REMOVED, alpha=0.09, linewidth=0)
            _score_bars(axes, title, scores.layers, values)
        if choices:
            _choice_strip(panels[-1], scores.layers, choices)
        for axes in panels[:-1]:
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
        figure.suptitle(
            "What each layer contributes, and which layers would go",
            x=0.012, ha="left", fontsize=18, fontweight="bold",
        )  # fmt: skip

    save_plot(draw, path, height=1.35 + _PANEL * len(measures) + strip)


def sweep_plot(record: SweepRecord, path: Path) -> None:
    """Perplexity over that of the original against the share of parameters removed, and below the speed, if measured.

    The axis of perplexity is logarithmic, so that the chord by which the knee is found is a straight line.
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
        axes.plot(x, values, color=_SINGLE, linewidth=1.4, zorder=1)
    errors = [[0.0, *(max(0.0, point.perplexity - point.interval[0]) for point in points)],
              [0.0, *(max(0.0, point.interval[1] - point.perplexity) for point in points)]]  # fmt: skip
    axes.errorbar(x, y, yerr=errors, color=_KEPT, marker="o", markersize=7, linewidth=2.2, capsize=5, zorder=3)
    axes.set_yscale("log")
    every = [*y, *(value for values in texts for value in values), *(end for p in points for end in p.interval)]
    low, high = min(every), max(every)
    axes.set_ylim(low / (high / low) ** 0.05 / 1.01, high * (high / low) ** 0.22 * 1.02)
    axes.set_yticks(_log_ticks(*axes.get_ylim()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("\u00d7{x:g}")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_ylabel("perplexity, as a multiple of\nthe original's (log scale)")
    handles = [_line("all texts, with 95 % interval", _KEPT, marker="o")]
    if len(texts) > 1:
        handles.append(_line("single texts", _SINGLE, width=1.4))
    knee = record.recommendation.knee
    at = next((point for point in points if knee is not None and knee in point.ratios), None)
    if at is not None:
        axes.plot([x[0], x[-1]], [y[0], y[-1]], color=_MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=2)
        handles.append(_line("chord to the largest ratio", _MUTED, width=1.2, style=(0, (5, 4))))
    _mark_points(axes, record, at)
    axes.set_title(f"{record.base.name.rpartition('/')[2]}: quality and size")
    _legend(axes, handles)


def _mark_points(axes: Axes, record: SweepRecord, knee: SweepPoint | None) -> None:
    """A ring around the knee, and around what is recommended if that is another; in words on a line to the top, where
    a curve that rises leaves room."""
    ratio = record.recommendation.ratio
    chosen = next((point for point in record.points if ratio is not None and ratio in point.ratios), None)
    marks = {id(point): (point, words) for point, words in ((chosen, "recommended"), (knee, "knee")) if point}
    for row, (point, words) in enumerate(marks.values()):
        x = 100 * point.parameter_share
        axes.plot([x], [point.perplexity], marker="o", markersize=15, markerfacecolor="none",
                  markeredgecolor=_REMOVED, markeredgewidth=2.2, linestyle="none", zorder=4)  # fmt: skip
        axes.axvline(x, color=_REMOVED, linewidth=1.2, linestyle=":", zorder=1)
        left_of = point.parameter_share > 0.4 * record.points[-1].parameter_share
        axes.annotate(
            f"{words}: ratio {point.ratios[0]:g}, \u00d7{point.perplexity:.2f}",
            (x, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(-8 if left_of else 8, -22 * row),
            textcoords="offset points", color=_REMOVED, fontweight="bold", va="top",
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
        return _line(label, colour, marker=marker)

    apart = 0.7 * points[-1].parameter_share  # the bars of the two must not lie on one another
    reading = line(lambda speed: speed.prefill, "reading a prompt", _KEPT, "o", -apart)
    writing = line(lambda speed: speed.decode, "writing, with range of the rounds", _REMOVED, "s", apart)
    axes.set_ylabel("speed, as a multiple\nof the original's")
    axes.yaxis.set_major_formatter("\u00d7{x:.2f}")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    _legend(axes, [reading, writing])


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values within an axis, two to nine of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)) if high > 2.5 * low else ():
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [tick for tick in ticks if low <= tick <= high]
        if 3 <= len(found) <= 9:
            return found
    if high > 2.5 * low:  # too long an axis for those
        tens = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
        return tens[:: math.ceil(len(tens) / 8)]
    step = next(
        (step for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 8),
        (high - low) / 4,
    )
    return [round(number * step, 6) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(label: str, colour: str, *, marker: str = "", width: float = 2.2, style: Any = "-") -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=width, linestyle=style, label=label)


def _shares(values: Sequence[float]) -> list[float]:
    """Each value over the highest."""
    highest = max(values)
    return [value / highest if highest else 0.0 for value in values]


def _score_bars(axes: Axes, title: str, layers: Sequence[int], values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    axes.bar(layers, values, width=0.78, color=_KEPT)
    low, high = min(finite), max(finite)
    if low > 0 and high / low > _LOG_RANGE:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.08)
        # At least two labelled ticks, and not so many that they overlap.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 1000 else (1.0,), numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        title += " (log scale)"
    else:
        axes.set_ylim(min(0.0, low * 1.1), max(0.0, high * 1.08) or 1.0)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title, fontsize=14, fontweight="normal", pad=6)
    _finish_layer_axis(axes, max(layers) + 1)


def _choice_strip(axes: Axes, layers: Sequence[int], choices: Mapping[str, Sequence[int]]) -> None:
    """One row of cells per choice; the cells of layers that would go are filled."""
    for row, going in enumerate(choices.values()):
        for gone in (False, True):
            cells = [layer for layer in layers if (layer in going) == gone]
            colour, hatch = (_REMOVED, "///") if gone else (_EMPTY, "")
            axes.bar(
                cells, 0.78, bottom=row - 0.39, width=0.78, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
    axes.set_title("would go, by share of layers removed", fontsize=14, fontweight="normal", pad=6)
    axes.set_yticks(range(len(choices)), list(choices))
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    _finish_layer_axis(axes, max(layers) + 1)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _finish_layer_axis(axes: Axes, count: int) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if count / step <= 34)
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.7, count - 0.3)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("decoder layer (index in the original model)")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)


def _patch(label: str, colour: str, hatch: str = "") -> Artist:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.008, 1.0), ncols=len(handles), columnspacing=1.6,
        handlelength=1.6, borderaxespad=0.1,
    )  # fmt: skip


def corrected_layers(record: RunRecord) -> list[int]:
    """The layers whose weights carry a correction; records of earlier versions tell of one at most."""
    compensation = record.compensation
    if not compensation.applied:
        return []
    listed = {entry.layer for entry in compensation.corrections}
    return sorted(listed) or ([] if compensation.site is None else [compensation.site])


def _mark_corrected(axes: Axes, record: RunRecord, heights: Mapping[int, float]) -> list[Artist]:
    """A triangle above each corrected layer. Returns what the legend needs."""
    from matplotlib.transforms import offset_copy

    layers = [layer for layer in corrected_layers(record) if layer in heights]
    if not layers:
        return []
    return list(
        axes.plot(
            layers, [heights[layer] for layer in layers], linestyle="none", marker="v", markersize=11, color=_INK,
            markeredgecolor="white", markeredgewidth=0.8, clip_on=False, label="corrected layer",
            transform=offset_copy(axes.transData, fig=axes.get_figure(root=True), y=10, units="points"),
        )
    )  # fmt: skip


def save_plot(draw: Callable[[Figure], None], path: Path, height: float = 5.2) -> None:
    """A figure 12 inches wide, as PNG, the same bytes for the same drawing."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure(figsize=(12, height), dpi=100, facecolor="white")
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.16))
        FigureCanvasAgg(figure)
        draw(figure)
        # Without the version of matplotlib in the file, the bytes depend on the pixels alone.
        figure.savefig(path, format="png", metadata={"Software": None})
