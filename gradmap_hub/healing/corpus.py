"""The sequences of a healing run, in the order in which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmap_hub.data.rows import Rows, sha256_of_ids


@dataclass(frozen=True)
class Corpus:
    """The sequences to train on, and those to measure on.

    Attributes:
        ids: The distinct training sequences, in the order of their first use, (n, tokens) int64.
        order: The sequence of each training example, as indices into `ids`.
        held_out: Sequences of each text that are not trained on.
        sources: The sequences of `ids` by text.
    """

    ids: Tensor
    order: list[int]
    held_out: list[Rows]
    sources: list[Rows]

    @property
    def tokens(self) -> int:
        """Number of tokens trained on, repetitions included."""
        return len(self.order) * self.ids.shape[1]

    @property
    def repeats(self) -> float:
        """How often a distinct sequence is used on average (1.0: once)."""
        return len(self.order) / len(self.ids)

    @property
    def sha256(self) -> str:
        return sha256_of_ids(self.ids)


def make_corpus(sources: Sequence[tuple[Rows, float]], held_out: Sequence[Rows], sequences: int, seed: int) -> Corpus:
    """A shuffled mixture of the sources, with the held-out sequences beside it.

    Args:
        sources: Each text with its weight in the mixture. Within a text, every sequence is used before any is used
            again.
        held_out: Sequences that are not trained on.
        sequences: Number of training examples.
        seed: Of the choice and the order.
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
