"""Keys and values of finished texts, for prompts with the same prefix.

The next turn of a conversation, or a shared system prompt, needs no prefill for what an earlier text has computed.
Texts are stored in blocks of BLOCK tokens, each looked up by its tokens and the block before it, so a common prefix is
stored once. Beyond the budget, the least recently used block is evicted; a block is never evicted before those that
follow it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradmap_hub.runtime.session import Steps

# Tokens per block. The tail of a text that does not fill a block is computed again.
BLOCK = 32
# Keys and values of consecutive tokens: an array (heads, tokens, head size) for each cache tensor of the graph.
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
    """Return the number of tokens in the common prefix of two texts, each (tokens,)."""
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
    """Return the total number of tokens in `parts`."""
    return sum(part[0].shape[1] for part in parts)


class PrefixCache:
    """At most `budget` bytes of keys and values; 0 stores nothing. Not thread-safe, except for reading `bytes`."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # The most recently used block last. Number 0 stands for the beginning of a text.
        self._blocks: OrderedDict[tuple[int, bytes], _Block] = OrderedDict()
        self._numbers = 0
        self.bytes = 0

    def find(self, tokens: np.ndarray) -> list[KeysValues]:
        """Return the blocks of the longest stored prefix of a text, BLOCK tokens each; empty if there is none."""
        found = self._chain(tokens)
        self._used(found)
        return [block.tensors for block in found]

    def store(self, tokens: np.ndarray, steps: Steps) -> None:
        """Store a copy of the keys and values of a text from its cache `steps`, except those of an incomplete block."""
        if not self._budget:
            return
        there = self._chain(tokens)
        self._used(there)
        count = len(tokens) // BLOCK
        if len(there) == count:
            return
        parts = steps.kept(len(there) * BLOCK, count * BLOCK)
        size = sum(part.nbytes for part in parts) // (count - len(there))
        # Blocks beyond the budget are not stored: they would only evict everything else.
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
        """Evict blocks until `size` bytes fit; return the arrays of the last one, to be reused, or None.

        The blocks of the text that is being stored are the most recently used, so they are not evicted.
        """
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
