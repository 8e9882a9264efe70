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


def make_corpus(sources: Sequence[tuple[Rows, float]], held_out: Sequence[Rows], sequences: int, seed: int) -> Corpus:
    """A shuffle of `sequences` sequences of all sources, and the ones to watch.

    Args:
        sources: Each text with its weight in the mixture. Within a text every sequence is used before any is used
            again.
    """
    draw = torch.Generator().manual_seed(seed)
    total = sum(weight for _, weight in sources)
    ends = [round(sequences * sum(w for _, w in sources[: place + 1]) / total) for place in range(len(sources))]
    picked: list[tuple[int, int]] = []  # (source, sequence within it)
    for place, (rows, _) in enumerate(sources):
        wanted = ends[place] - (ends[place - 1] if place else 0)
        passes = -(-wanted // len(rows.ids))
        own = [index for _ in range(passes) for index in torch.randperm(len(rows.ids), generator=draw).tolist()]
        picked += [(place, index) for index in own[:wanted]]
    picked = [picked[index] for index in torch.randperm(len(picked), generator=draw).tolist()]
    used = {pair: number for number, pair in enumerate(dict.fromkeys(picked))}
    return Corpus(
        torch.stack([sources[place][0].ids[index] for place, index in used]),
        [used[pair] for pair in picked],
        list(held_out),
        [
            Rows(rows.name, rows.sha256, rows.ids[[index for source, index in used if source == place]])
            for place, (rows, _) in enumerate(sources)
        ],
    )
