"""The figures of the model card: the score of each layer, the shift of the mean hidden state, and the divergence during
healing.

matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradmap_hub.config import WITHOUT_WEIGHTS
from gradmap_hub.figures import INK, KEPT, LOG_RANGE, REMOVED, REMOVED_AREA, layer_axis, legend, patch
from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scored_by_gates(record: RunRecord) -> bool:
    """Whether the scores of the layers are gate gradients, because no weight gradients were computed."""
    return record.metric in WITHOUT_WEIGHTS


def layers_plot(record: RunRecord, figure: Figure) -> None:
    """Draw one bar per decoder layer: its gradient score, and whether it was removed."""
    axes = figure.add_subplot()
    scores = [layer.score for layer in record.layers]
    indices = [layer.index for layer in record.layers]
    colours = [KEPT if layer.kept else REMOVED for layer in record.layers]
    bars = axes.bar(indices, scores, width=0.78, color=colours)
    for bar, layer in zip(bars, record.layers, strict=True):
        if not layer.kept:
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    low, high = min(scores), max(scores)
    if low > 0 and high / low > LOG_RANGE:
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
    axes.set_ylabel(f"gate gradient (nats{scale})" if scored_by_gates(record) else f"gradient score (L1 norm{scale})")
    layer_axis(axes, len(record.layers))
    marks = _mark_corrected(axes, record, dict(zip(indices, scores, strict=True)))
    legend(axes, [patch("kept", KEPT), patch("removed", REMOVED, "///"), *marks])


def shift_plot(record: RunRecord, figure: Figure) -> None:
    """Draw the relative shift of the mean hidden state after each kept layer, before compensation; removed layers are
    shaded gaps."""
    compensation = record.compensation
    axes = figure.add_subplot()
    percents = [100 * value for value in compensation.relative_shift]
    for index in record.removed:
        axes.axvspan(index - 0.5, index + 0.5, facecolor=REMOVED, alpha=0.13, linewidth=0)
    axes.bar(compensation.shift_layers, percents, width=0.78, color=KEPT)
    top = max(percents)
    axes.set_ylim(0, top * 1.22 or 1)
    gone = f"{len(record.removed)} layer{'s' if len(record.removed) > 1 else ''}"
    axes.set_title(f"With {gone} removed, the mean hidden state shifts by up to {top:.0f}%")
    axes.set_ylabel("relative mean shift (%)")
    layer_axis(axes, len(record.layers))
    marks = _mark_corrected(axes, record, dict(zip(compensation.shift_layers, percents, strict=True)))
    legend(axes, [patch("kept layer, before compensation", KEPT), patch("removed layer", REMOVED_AREA), *marks])


def healing_plot(record: RunRecord, figure: Figure) -> None:
    """Draw the divergence from the original, on held-out sequences and in training, against the tokens trained on."""
    heal = record.heal
    assert heal is not None
    axes = figure.add_subplot()
    checks = [check for check in heal.checks if check.held_out is not None]
    tokens = [0, *(check.tokens for check in checks)]
    held_out = [heal.divergence_before or 0.0, *(check.held_out or 0.0 for check in checks)]
    axes.plot(tokens[1:], [check.divergence for check in checks], color=REMOVED, marker="o", label="in training")
    axes.plot(tokens, held_out, color=KEPT, marker="o", label="on held-out sequences")
    axes.set_ylim(0, 1.22 * max(held_out))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("KL from the original (nats per token)")
    axes.set_title(f"Healing: divergence from the original {held_out[0]:.2f} to {min(held_out):.2f}")
    legend(axes, axes.get_lines())


def corrected_layers(record: RunRecord) -> list[int]:
    """The layers with corrected weights; records of earlier versions name one at most."""
    compensation = record.compensation
    if not compensation.applied:
        return []
    listed = {entry.layer for entry in compensation.corrections}
    return sorted(listed) or ([] if compensation.site is None else [compensation.site])


def _mark_corrected(axes: Axes, record: RunRecord, heights: Mapping[int, float]) -> list[Artist]:
    """Draw a triangle above each corrected layer; returns the legend entry, if any."""
    from matplotlib.transforms import offset_copy

    layers = [layer for layer in corrected_layers(record) if layer in heights]
    if not layers:
        return []
    return list(
        axes.plot(
            layers, [heights[layer] for layer in layers], linestyle="none", marker="v", markersize=11, color=INK,
            markeredgecolor="white", markeredgewidth=0.8, clip_on=False, label="corrected layer",
            transform=offset_copy(axes.transData, fig=axes.get_figure(root=True), y=10, units="points"),
        )
    )  # fmt: skip
