"""The sequences of a healing run, in the order in which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmap_hub.data.rows import Rows, sha256_of_ids


@dataclass(frozen=True)
class Corpus:
    """Sequences to train on, and others to watch.

    `ids` (n, tokens) int64: each distinct sequence that is used, in the order of its first use. `repeats`: how often
    the whole is read (1.0: once). `held_out`: sequences that are not trained on. `sources`: per source, the
    sequences of `ids` that are its own.
    """

    ids: Tensor
    order: list[int]
    held_out: list[Rows]
    sources: list[Rows]

    @property
    def tokens(self) -> int:
        return len(self.order) * self.ids.shape[1]

    @property
    def repeats(self) -> float:
        return len(self.order) / len(self.ids)

    @property
    def sha256(self) -> str:
        return sha256_of_ids(self.ids)


def make_corpus(sources: Sequence[Rows], held_out: Sequence[Rows], sequences: int, seed: int) -> Corpus:
    """The first `sequences` sequences of an endless seeded shuffle of all sources, and the ones to watch."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.cat([rows.ids for rows in sources])
    origin = torch.cat([torch.full((len(rows.ids),), place) for place, rows in enumerate(sources)])
    order: list[int] = []
    while len(order) < sequences:
        order += torch.randperm(len(ids), generator=draw).tolist()
    order = order[:sequences]
    used = list(dict.fromkeys(order))
    place_of = {place: new for new, place in enumerate(used)}
    origins = origin[used]
    return Corpus(
        ids[used],
        [place_of[place] for place in order],
        list(held_out),
        [Rows(rows.name, rows.sha256, ids[used][origins == place]) for place, rows in enumerate(sources)],
    )
