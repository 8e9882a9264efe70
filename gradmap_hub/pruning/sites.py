"""Where stage 2 compensates: at the gaps, or where the mean hidden state moved most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pruning.residual import ATTENTION, MLP

MAX_SITES = 9


@dataclass(frozen=True)
class Site:
    """The linear of `layer` that writes the output of `part` (MLP or ATTENTION) to the residual stream, and the place
    whose original stream it restores: after the layer `target` for MLP, after its attention for ATTENTION (where target
    = layer). Both are original indices."""

    layer: int
    part: str
    target: int


def sites_at_gaps(
    kept: Sequence[int], removed: Sequence[int], *, behind: bool = False, limit: int = MAX_SITES
) -> list[Site]:
    """The MLP before each gap, in the order of the stream. With `behind`, and at a gap without a layer before it, also
    attention and MLP of the first layer after the gap. If there would be more than `limit` sites, the smallest gaps are
    left out. `kept`, `removed`: original indices."""
    gone = set(removed)
    gaps: list[tuple[int, int]] = []  # first and last removed layer of each run
    for layer in sorted(gone):
        if gaps and gaps[-1][1] == layer - 1:
            gaps[-1] = (gaps[-1][0], layer)
        else:
            gaps.append((layer, layer))
    by_size = sorted(gaps, key=lambda gap: (gap[0] - gap[1], gap[0]))[: max(1, limit // 3 if behind else limit)]
    sites: list[Site] = []
    for first, last in sorted(by_size):
        if first > 0 and Site(first - 1, MLP, first - 1) not in sites:
            sites.append(Site(first - 1, MLP, last))
        elif first > 0:
            # A single layer between two gaps gets one fit, for the second gap.
            sites[sites.index(Site(first - 1, MLP, first - 1))] = Site(first - 1, MLP, last)
        if (behind or first == 0) and last + 1 in kept:
            sites += [Site(last + 1, ATTENTION, last + 1), Site(last + 1, MLP, last + 1)]
    return sites


@dataclass(frozen=True)
class Shift:
    """First moment of the drift after each kept layer, from the original's stream H and the pruned model's H':
    ||mean(H') - mean(H)||_2, absolute and relative to ||mean(H)||_2. `layers` are original indices."""

    layers: list[int]
    absolute: list[float]
    relative: list[float]


def mean_shift(
    decoder: Decoder, ids: Tensor, kept: Sequence[int], row_done: Callable[[], None] = lambda: None
) -> Shift:
    """The mean shift after each kept layer, over sequences `ids` (n, tokens). `row_done`: called after each
    sequence."""
    original: dict[int, Tensor] = {}
    pruned: dict[int, Tensor] = {}

    def add(into: dict[int, Tensor], layer: int, states: list[Tensor]) -> None:
        mean = torch.stack([hidden.double().mean(dim=(0, 1)) for hidden in states]).sum(dim=0)
        into[layer] = into[layer] + mean if layer in into else mean

    present = set(kept)
    for group in ids.split(decoder.rows_per_pass):
        full = [decoder.embed(row) for row in group.split(1)]
        short = list(full)
        for layer in range(decoder.count):
            with decoder.layer(layer):
                decoder.carry(full, [layer])
                if layer in present:
                    decoder.carry(short, [layer])
                    add(original, layer, full)
                    add(pruned, layer, short)
        for _ in group:
            row_done()
    absolute = [float((pruned[layer] - original[layer]).norm()) / len(ids) for layer in kept]
    relative = [
        value * len(ids) / max(float(original[layer].norm()), 1e-12)
        for value, layer in zip(absolute, kept, strict=True)
    ]
    return Shift(list(kept), absolute, relative)


def largest_shift(shift: Shift) -> Site:
    """The site of the paper (GradMAP, arXiv 2602.14649): argmax of the absolute mean shift."""
    layer = shift.layers[max(range(len(shift.layers)), key=lambda position: shift.absolute[position])]
    return Site(layer, MLP, layer)
