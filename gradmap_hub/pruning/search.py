"""Stage 1, second half: which set of layers goes, decided by the loss on held-out rows.

Any single ranking is fragile, and greedy search on the loss (SLEB) is slow and fits its own rows. Here the rankings of
one scoring pass propose sets; the loss on rows they never saw compares them; others are made from them by

    grow       L(S + m)             one more kept layer removed, from a set of one layer less
    add-back   b[l] = L(S - l)      one removed layer put back
    remove     a[m] = L(S + m)      one more kept layer removed
    swap       L(S - l + m)  ~  b[l] + a[m] - L(S)       predicted from the two, then measured for the best few

A window and one layer elsewhere often loses less than the window that is one longer, and two corrections mend much of
it; no ranking of single layers proposes such a set.

All trials of a sweep share one walk along the layers: a trial starts from the residual stream where it differs, so it
costs the layers behind that point only. Sets and sweeps race: all see a quarter of the rows, the best few the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor

from gradmap_hub.models.decoder import Decoder
from gradmap_hub.record import GROWN, SWAPPED, Candidate

# Sets, and trials of a sweep, that go on to all rows; swaps that are measured after being predicted.
SURVIVING_SETS = 3
SURVIVING_TRIALS = 4
SWAPS_MEASURED = 2
# Every further round costs as much as the first and gains less.
SWAP_ROUNDS = 1


class Search:
    """The loss of sets of removed layers on rows `ids` (n, tokens), in nats per token."""

    def __init__(self, decoder: Decoder, ids: Tensor, rows_done: Callable[[int], None] = lambda _rows: None) -> None:
        self._decoder = decoder
        self._ids = ids
        self._rows_done = rows_done
        self._known: dict[frozenset[int], float] = {}
        self._names: dict[frozenset[int], str] = {}

    def loss(self, removed: Sequence[int], name: str) -> float:
        """Loss on all rows; remembered, so that a set is measured once."""
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
        """Summed loss over `rows` with each of `layers` flipped, removed or put back, one at a time.

        All trials walk along the layers together, each from where it differs, so that a layer is fetched once.
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
        """Rows that everything sees."""
        return max(1, len(self._ids) // 4)

    def _best(self, sets: Mapping[str, Sequence[int]], count: int) -> list[str]:
        """Names of the `count` sets of the lowest loss on a quarter of the rows, lowest first."""
        if len(sets) <= count:
            return list(sets)
        heat = self._ids[: self._heat]
        first = {
            name: math.fsum(self._decoder.losses(heat, self._live(set(removed)), self._rows_done))
            for name, removed in sets.items()
        }
        return sorted(sets, key=lambda name: first[name])[:count]

    def best_seeds(self, seeds: Mapping[str, Sequence[int]]) -> None:
        """Measure the sets that a quarter of the rows did not rule out."""
        for name in self._best(seeds, SURVIVING_SETS):
            self.loss(seeds[name], name)

    def grow(self, stems: Mapping[str, Sequence[int]]) -> None:
        """Measure the best of `stems` with one more layer removed: all of them on a quarter of the rows, the best few
        on all."""
        for name in self._best(stems, 1):
            stem = stems[name]
            for layer, loss in self.race(stem, self._live(set(stem))).items():
                key = frozenset({*stem, layer})
                self._known.setdefault(key, loss)
                self._names.setdefault(key, f"{name}{GROWN}")

    def race(self, removed: Sequence[int], layers: Sequence[int]) -> dict[int, float]:
        """Mean loss with each of `layers` flipped, for those that a quarter of the rows did not rule out."""
        heat = self._heat
        first = self.flips(removed, layers, self._ids[:heat])
        survivors = sorted(first, key=lambda layer: first[layer])[:SURVIVING_TRIALS]
        if heat == len(self._ids):
            return {layer: first[layer] / heat for layer in survivors}
        rest = self.flips(removed, survivors, self._ids[heat:])
        return {layer: (first[layer] + rest[layer]) / len(self._ids) for layer in survivors}

    def swap(self, removed: Sequence[int], name: str) -> list[int]:
        """Exchange one removed for one kept layer if that lowers the loss, at most SWAP_ROUNDS times."""
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
    """The sets measured on all rows, lowest loss first. `seeds`: named sets of one size; `stems`: named sets of one
    layer less, the best of which is tried with every further layer. `swaps`: improve the best."""
    search = Search(decoder, ids, rows_done)
    search.best_seeds(seeds)
    search.grow(stems or {})
    if swaps:
        leader = search.ranked()[0]
        search.swap(leader.removed, leader.name)
    return search.ranked()
