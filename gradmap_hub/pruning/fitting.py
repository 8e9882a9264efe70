"""Fits one site: its Gram matrices, the ridge solution, and the parameters with the solution folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pruning.residual import MLP, Tap, Writer, writer_of
from gradmap_hub.pruning.ridge import Gram, RidgeSolution, solve
from gradmap_hub.pruning.sites import Site
from gradmap_hub.pruning.streams import stream_after

# Sequences whose products are summed in float32 before they enter the float64 sums: few enough to lose no precision.
_ROWS_PER_SUM = 4


def accumulate_gram(
    decoder: Decoder,
    site: Site,
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    row_done: Callable[[], None] = lambda: None,
) -> Gram:
    """Gram matrices of one site, float64. `hidden`: the pruned model's stream before the site's layer; `targets`: the
    stream to reach after the site; both per sequence, (1, tokens, d). `row_done`: called after each sequence."""
    with decoder.layer(site.layer) as module, torch.no_grad():
        writer = writer_of(module, decoder.architecture, site.part)
        width, features = writer.weight.shape
        like = {"dtype": torch.float64, "device": decoder.device}
        zz, ze = torch.zeros(features, features, **like), torch.zeros(features, width, **like)
        z_sum, e_sum = torch.zeros(features, **like), torch.zeros(width, **like)
        # float64 streams are multiplied in float64, all others in float32.
        single = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
        zz_part, ze_part = torch.zeros_like(zz, dtype=single), torch.zeros_like(ze, dtype=single)
        for index, (states, wanted) in enumerate(zip(hidden, targets, strict=True)):
            tap, reached = _reached(decoder, site, writer, states)
            drift = wanted.flatten(0, 1).to(single) - reached.flatten(0, 1).to(single)  # (tokens, d)
            z, drift = writer.equation(tap, drift)
            zz_part.addmm_(z.T, z)
            ze_part.addmm_(z.T, drift)
            z_sum += z.sum(dim=0)
            e_sum += drift.sum(dim=0)
            if index % _ROWS_PER_SUM == _ROWS_PER_SUM - 1 or index == len(hidden) - 1:
                zz += zz_part
                ze += ze_part
                zz_part.zero_()
                ze_part.zero_()
            row_done()
        bias = None if writer.bias is None else writer.bias.detach().double().clone()
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    return Gram(zz, ze, tokens, bias=bias, z=z_sum, e=e_sum)


def _reached(decoder: Decoder, site: Site, writer: Writer, states: Tensor) -> tuple[Tap, Tensor]:
    """Run the site's layer on `states`, the stream before it. Returns the writer's tap and the stream after the site;
    both streams are (1, tokens, d)."""
    with Tap(writer.tapped) as tap, Tap(writer.added) as added:
        after = decoder.step(states, site.layer)
    return tap, after if site.part == MLP else stream_after(states, added, writer)


def fitted_gain(
    decoder: Decoder, site: Site, hidden: Sequence[Tensor], targets: Sequence[Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new weight of the norm on a site's output, by parameter name, fitted with the site's new `values` in place.
    `hidden`, `targets`: as in `accumulate_gram`."""
    with decoder.layer(site.layer) as module, decoder.replaced(site.layer, values), torch.no_grad():
        writer = writer_of(module, decoder.architecture, site.part)
        width = len(writer.weight)
        like = {"dtype": torch.float64, "device": decoder.device}
        cross, square = torch.zeros(width, **like), torch.zeros(width, **like)
        for states, wanted in zip(hidden, targets, strict=True):
            with Tap(writer.added) as added:
                _, reached = _reached(decoder, site, writer, states)
            output = added.output.reshape(-1, width).double()
            drift = (wanted.double() - reached.double()).reshape(-1, width) / writer.scale
            cross += (output * (output + drift)).sum(dim=0)
            square += output.square().sum(dim=0)
        return writer.fitted_gain(cross, square)


def site_kind(decoder: Decoder, site: Site, kind: str) -> str:
    """`kind`, or "projection" if the site is a mixture of experts, which allows no other."""
    with decoder.layer(site.layer) as module:
        return "projection" if writer_of(module, decoder.architecture, site.part).experts else kind


def through_norm(decoder: Decoder, site: Site) -> bool:
    """Whether a norm lies between a site and the residual stream."""
    row = decoder.architecture
    return (row.mlp_norm if site.part == MLP else row.attention_norm) is not None


def solved(
    decoder: Decoder, site: Site, gram: Gram, kind: str, strength: float
) -> tuple[RidgeSolution, dict[str, Tensor]]:
    """The ridge solution of a site, and the parameters of its layer with the solution folded in, by name. `kind`,
    `strength`: see `ridge.solve`."""
    with decoder.layer(site.layer) as module:
        writer = writer_of(module, decoder.architecture, site.part)
        solution = solve(gram, writer.weight, kind=kind, strength=strength)
        return solution, writer.folded(solution)
