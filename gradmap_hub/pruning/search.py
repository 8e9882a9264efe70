"""Stage 1, second half: which set of layers is removed, decided by the loss on held-out sequences.

A single ranking is fragile, and greedy search on the loss (SLEB) is slow and overfits its own sequences. Here the
rankings of one scoring pass propose sets, and the loss on sequences they never saw compares them. More sets come from

    grow       L(S + m)             one more kept layer removed, from a set of one layer less
    add-back   b[l] = L(S - l)      one removed layer put back
    remove     a[m] = L(S + m)      one more kept layer removed
    swap       L(S - l + m)  ~  b[l] + a[m] - L(S)       predicted from the two, then measured for the best few

A window plus one layer elsewhere often loses less than a window that is one layer longer, and compensation at both
gaps recovers much of the loss; no ranking of single layers proposes such a set.

All trials of a pass share one walk along the layers: a trial branches off where it differs and costs only the layers
after that point. Sets and trials race: all see a quarter of the sequences, the best few see the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor

from gradmap_hub.models.decoder import Decoder
from gradmap_hub.record import GROWN, SWAPPED, Candidate

# Sets and trials that are measured on all sequences; predicted swaps that are measured.
SURVIVING_SETS = 3
SURVIVING_TRIALS = 4
SWAPS_MEASURED = 2
# A further round costs as much as the first and gains less.
SWAP_ROUNDS = 1


class Search:
    """Measures the loss of sets of removed layers on sequences `ids` (n, tokens), in nats per token. `rows_done`:
    called with the number of sequences of each pass."""

    def __init__(self, decoder: Decoder, ids: Tensor, rows_done: Callable[[int], None] = lambda _rows: None) -> None:
        self._decoder = decoder
        self._ids = ids
        self._rows_done = rows_done
        self._known: dict[frozenset[int], float] = {}
        self._names: dict[frozenset[int], str] = {}

    def loss(self, removed: Sequence[int], name: str) -> float:
        """Loss on all sequences without the layers `removed`, cached by set. `name`: of the set, if it is new."""
        key = frozenset(removed)
        if key not in self._known:
            live = self._live(key)
            losses = self._decoder.losses(self._ids, live, self._rows_done)
            self._known[key] = math.fsum(losses) / len(losses)
            self._names[key] = name
        return self._known[key]

    def _live(self, removed: Set[int]) -> list[int]:
        return [layer for layer in range(self._decoder.count) if layer not in removed]

    def flips(self, removed: Sequence[int], layers: Sequence[int], rows: Tensor) -> dict[int, float]:
        """Layer -> loss summed over `rows` (n, tokens), for each of `layers` flipped alone (removed, or put back).

        All trials walk along the layers together, each from where it differs, so that each layer is fetched once.
        """
        gone = set(removed)
        totals = dict.fromkeys(layers, 0.0)
        decoder = self._decoder
        for group in rows.split(decoder.rows_per_pass):
            ids = group.split(1)
            stream = [decoder.embed(row) for row in ids]
            trials: dict[int, list[Tensor]] = {}
            for layer in range(decoder.count):
                with decoder.layer(layer):
                    started = list(stream)
                    if layer in gone:
                        if layer in totals:
                            decoder.carry(started, [layer])
                    else:
                        for states in (*trials.values(), stream):
                            decoder.carry(states, [layer])
                if layer in totals:
                    trials[layer] = started
            for layer, states in trials.items():
                with torch.no_grad():
                    totals[layer] += sum(
                        float(decoder.row_losses(last, row)) for last, row in zip(states, ids, strict=True)
                    )
            self._rows_done(len(group))
        return totals

    @property
    def _heat(self) -> int:
        """Number of sequences of the first round."""
        return max(1, len(self._ids) // 4)

    def _best(self, sets: Mapping[str, Sequence[int]], count: int) -> list[str]:
        """Names of the `count` sets of the lowest loss on a quarter of the sequences, lowest first."""
        if len(sets) <= count:
            return list(sets)
        heat = self._ids[: self._heat]
        first = {
            name: math.fsum(self._decoder.losses(heat, self._live(set(removed)), self._rows_done))
            for name, removed in sets.items()
        }
        return sorted(sets, key=lambda name: first[name])[:count]

    def best_seeds(self, seeds: Mapping[str, Sequence[int]]) -> None:
        """Measure on all sequences the SURVIVING_SETS sets that are best on a quarter of them."""
        for name in self._best(seeds, SURVIVING_SETS):
            self.loss(seeds[name], name)

    def grow(self, stems: Mapping[str, Sequence[int]]) -> None:
        """Measure the best of `stems` with one further layer removed: every choice of it on a quarter of the sequences,
        and the SURVIVING_TRIALS best on all."""
        for name in self._best(stems, 1):
            stem = stems[name]
            for layer, loss in self.race(stem, self._live(set(stem))).items():
                key = frozenset({*stem, layer})
                self._known.setdefault(key, loss)
                self._names.setdefault(key, f"{name}{GROWN}")

    def race(self, removed: Sequence[int], layers: Sequence[int]) -> dict[int, float]:
        """Layer -> mean loss with it flipped, for the SURVIVING_TRIALS of `layers` that are best on a quarter of the
        sequences."""
        heat = self._heat
        first = self.flips(removed, layers, self._ids[:heat])
        survivors = sorted(first, key=lambda layer: first[layer])[:SURVIVING_TRIALS]
        if heat == len(self._ids):
            return {layer: first[layer] / heat for layer in survivors}
        rest = self.flips(removed, survivors, self._ids[heat:])
        return {layer: (first[layer] + rest[layer]) / len(self._ids) for layer in survivors}

    def swap(self, removed: Sequence[int], name: str) -> list[int]:
        """Exchange a removed for a kept layer if that lowers the loss, at most SWAP_ROUNDS times. Returns the set."""
        best = sorted(removed)
        for _ in range(SWAP_ROUNDS):
            loss = self.loss(best, name)
            back = self.race(best, best)
            more = self.race(best, self._live(set(best)))
            predicted = sorted((back[out] + more[new] - loss, out, new) for out in back for new in more)
            tried = [sorted({*best, new} - {out}) for _, out, new in predicted[:SWAPS_MEASURED]]
            leader = min(tried, key=lambda candidate: self.loss(candidate, f"{name}{SWAPPED}"))
            if self.loss(leader, name) >= loss:
                break
            best = leader
        return best

    def ranked(self) -> list[Candidate]:
        """Every measured set, lowest loss first."""
        found = [Candidate(self._names[key], sorted(key), loss) for key, loss in self._known.items()]
        return sorted(found, key=lambda candidate: (candidate.loss, candidate.removed))


def search_layers(
    decoder: Decoder,
    ids: Tensor,
    seeds: Mapping[str, Sequence[int]],
    *,
    stems: Mapping[str, Sequence[int]] | None = None,
    swaps: bool,
    rows_done: Callable[[int], None] = lambda _rows: None,
) -> list[Candidate]:
    """The sets of removed layers that were measured on all sequences `ids` (n, tokens), lowest loss first.

    Args:
        seeds: Sets of the same size, by name.
        stems: Sets of one layer less, by name; the best of them is tried with every further layer.
        swaps: Improve the best set by swaps.
        rows_done: Called with the number of sequences of each pass.
    """
    search = Search(decoder, ids, rows_done)
    search.best_seeds(seeds)
    search.grow(stems or {})
    if swaps:
        leader = search.ranked()[0]
        search.swap(leader.removed, leader.name)
    return search.ranked()
