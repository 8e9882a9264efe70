"""Keys and values of texts that have ended, for prompts that begin in the same way.

A conversation's next turn and a shared system prompt need no prefill for what an earlier text computed. Texts are kept
in blocks of BLOCK tokens, each found by its tokens and the block before it, so what two texts have in common is stored
once. Over the budget, the block that was least recently used goes first; a block is never older than one after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradmap_hub.runtime.session import Steps

# Tokens per block. The tail of a text that fills no block is computed again.
BLOCK = 32
# Keys and values of some tokens: (heads, tokens, head size) of every cache tensor.
KeysValues = Sequence[np.ndarray]


@dataclass(eq=False)
class _Block:
    number: int
    key: tuple[int, bytes]
    tensors: list[np.ndarray]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Return with how many equal tokens two texts begin."""
    count = min(len(first), len(second))
    different = np.flatnonzero(first[:count] != second[:count])
    return int(different[0]) if len(different) else count


def write_into(cache: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Write parts (heads, tokens, head size) one after the other to the beginning of a cache of the same layout."""
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        cache[:, start:stop] = part
        start = stop


def tokens_of(parts: Sequence[KeysValues]) -> int:
    """Return how many tokens parts have together."""
    return sum(part[0].shape[1] for part in parts)


class PrefixCache:
    """At most `budget` bytes of keys and values; 0 keeps nothing. Not thread-safe, but for `bytes`."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # The most recently used block last. Number 0 stands for the beginning of a text.
        self._blocks: OrderedDict[tuple[int, bytes], _Block] = OrderedDict()
        self._numbers = 0
        self.bytes = 0

    def find(self, tokens: np.ndarray) -> list[KeysValues]:
        """Return the blocks of the longest known beginning of a text: BLOCK tokens each."""
        found = self._chain(tokens)
        self._used(found)
        return [block.tensors for block in found]

    def store(self, tokens: np.ndarray, steps: Steps) -> None:
        """Keep a copy of the keys and values of a text, those of a last part shorter than a block excepted."""
        if not self._budget:
            return
        there = self._chain(tokens)
        self._used(there)
        count = len(tokens) // BLOCK
        if len(there) == count:
            return
        parts = steps.kept(len(there) * BLOCK, count * BLOCK)
        size = sum(part.nbytes for part in parts) // (count - len(there))
        # What does not fit at all would only drive out everything else.
        room = self._budget // size - len(there)
        chain = list(there)
        for number in range(len(there), min(count, len(there) + room)):
            own = slice((number - len(there)) * BLOCK, (number - len(there) + 1) * BLOCK)
            spare = self._spare(size)
            tensors = [np.empty_like(part[:, own], order="C") for part in parts] if spare is None else spare
            for tensor, part in zip(tensors, parts, strict=True):
                np.copyto(tensor, part[:, own])
            self._numbers += 1
            key = self._key(chain, tokens, number)
            block = self._blocks[key] = _Block(self._numbers, key, tensors)
            self.bytes += block.bytes
            chain.append(block)
        self._used(chain)

    def _spare(self, size: int) -> list[np.ndarray] | None:
        """Make room for a block; return the memory of one that goes. `store` has made its own the newest ones."""
        spare = None
        while self.bytes + size > self._budget:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.bytes
            spare = oldest.tensors
        return spare

    def _chain(self, tokens: np.ndarray) -> list[_Block]:
        chain: list[_Block] = []
        for number in range(len(tokens) // BLOCK):
            block = self._blocks.get(self._key(chain, tokens, number))
            if block is None:
                break
            chain.append(block)
        return chain

    def _used(self, chain: Sequence[_Block]) -> None:
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    @staticmethod
    def _key(chain: Sequence[_Block], tokens: np.ndarray, number: int) -> tuple[int, bytes]:
        own = np.ascontiguousarray(tokens[number * BLOCK : (number + 1) * BLOCK], dtype=np.int64)
        return (chain[-1].number if chain else 0, own.tobytes())
