"""The residual streams of the original and the pruned model over the same sequences, carried along the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pruning.residual import ATTENTION, MLP, Tap, Writer, writer_of
from gradmap_hub.pruning.sites import Site


class Original:
    """The original's residual stream over sequences `ids` (n, tokens) before requested layers, computed once for all
    sets of removed layers.

    Requested streams are cached, n x tokens x d each; only the latest if layers are fetched from disk. The stream must
    be requested beyond a layer before the weights of that layer are replaced.
    """

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self._decoder = decoder
        self._ids = ids
        self._known: dict[int, list[Tensor]] = {}

    def before(self, layer: int) -> list[Tensor]:
        """The stream before a layer, per sequence (1, tokens, d), in a list that the caller may change."""
        if layer not in self._known:
            nearest = max((known for known in self._known if known < layer), default=None)
            if nearest is None:
                states, start = [self._decoder.embed(row) for row in self._ids.split(1)], 0
            else:
                states, start = list(self._known[nearest]), nearest
            self._decoder.carry(states, range(start, layer))
            self.keep(layer, states)
        return list(self._known[layer])

    def keep(self, layer: int, states: list[Tensor]) -> None:
        """Store the stream before a layer that the caller computed."""
        if self._decoder.rows_per_pass > 1:
            self._known.clear()
        self._known[layer] = states


class Originals:
    """The original's streams over the sequences for fitting and over those for selection."""

    def __init__(self, decoder: Decoder, rows: CalibrationRows) -> None:
        self.fit = Original(decoder, rows.fit)
        self.selection = Original(decoder, rows.selection)


class Streams:
    """The residual streams of original and pruned model over the same sequences, equal before layer `start`. `kept`:
    original indices of the layers of the pruned model."""

    def __init__(self, decoder: Decoder, original: Original, kept: Sequence[int], start: int) -> None:
        self._decoder = decoder
        self._original = original
        self._kept = kept
        self.pruned = original.before(start)
        self._pruned_next = start

    def targets(self, site: Site) -> list[Tensor]:
        """The original's stream that a site should restore, per sequence (1, tokens, d)."""
        if site.part == MLP:
            return self._original.before(site.target + 1)
        decoder = self._decoder
        middles: list[Tensor] = []
        after: list[Tensor] = []
        states = self._original.before(site.target)
        with decoder.layer(site.target) as module, torch.no_grad():
            for hidden in states:
                writer = writer_of(module, decoder.architecture, ATTENTION)
                with Tap(writer.added) as tap:
                    after.append(decoder.step(hidden, site.target))
                middles.append(stream_after(hidden, tap, writer))
        self._original.keep(site.target + 1, after)  # before the layer's weights are replaced
        return middles

    def before(self, layer: int) -> list[Tensor]:
        """The pruned model's stream before a layer, per sequence (1, tokens, d)."""
        self._decoder.carry(self.pruned, [index for index in self._kept if self._pruned_next <= index < layer])
        self._pruned_next = max(self._pruned_next, layer)
        return self.pruned


def stream_after(hidden: Tensor, added: Tap, writer: Writer) -> Tensor:
    """The stream after a writer's output is added to it, (1, tokens, d)."""
    output = added.output.reshape(hidden.shape)
    return hidden + (output if writer.scale == 1.0 else writer.scale * output)


def stream_losses(decoder: Decoder, hidden: Sequence[Tensor], ids: Tensor, layers: Sequence[int]) -> Tensor:
    """NLL in nats per token, (n,) float64, of sequences `ids` (n, tokens) with streams `hidden` before `layers`."""
    states = list(hidden)
    with torch.no_grad():
        decoder.carry(states, layers)
        losses = [decoder.row_losses(last, row) for last, row in zip(states, ids.split(1), strict=True)]
    return torch.cat(losses).double().cpu()
