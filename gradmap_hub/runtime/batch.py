"""Generations of one model that are decoded together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime import generation as generating
from gradmap_hub.runtime.generation import Generation
from gradmap_hub.runtime.pool import Row, RowPool
from gradmap_hub.runtime.prefixes import BLOCK, KeysValues, PrefixCache, common_prefix, tokens_of

if TYPE_CHECKING:  # importing it needs ONNX Runtime; `load` reports when it is missing
    from gradmap_hub.runtime.session import Session
    from gradmap_hub.runtime.text_model import TextModel

# Prompt tokens per round beside generations that write: they wait for it between two tokens.
PREFILL_BESIDE = 64
_LEAST = 16  # fewer tokens take nearly as long


class Batch:
    """Generations of one model, decoded together if the graph supports it (see pool.py).

    Each yields the same tokens as on its own. Not thread-safe.

    `prefix_cache`: bytes for the keys and values of texts that have ended, which prompts with the same beginning start
    from, as they do from those of running texts; None: every prompt is computed. `in_turn`: prompts are read one after
    the other, with at most so many tokens per round that the others go on writing; otherwise all at the same time.
    """

    def __init__(
        self, model: TextModel, session: Session, rows: int, *, prefix_cache: int | None = None, in_turn: bool = False
    ) -> None:
        self._model = model
        self._pool = RowPool(session, rows, model.context_length) if session.batches else None
        self._prefixes = None if prefix_cache is None or not session.readable else PrefixCache(prefix_cache)
        self._in_turn = in_turn
        self._rounds = 0

    @property
    def prefix_bytes(self) -> int:
        """Bytes of keys and values of texts that have ended."""
        return 0 if self._prefixes is None else self._prefixes.bytes

    def start(self, prompt_ids: Sequence[int], **options: Any) -> Generation:
        """Create a generation in this batch; options as in `TextModel.start`.

        Raises:
            IndexError: all rows are in use.
            PromptError: as in `TextModel.start`.
        """
        pool = self._pool
        keep = None if self._prefixes is None else self._prefixes.store
        room = None if pool is None else lambda _: pool.take()
        return self._model.start(prompt_ids, room=room, keep=keep, **options)

    def step(self, answers: Sequence[Generation]) -> list[str | Exception]:
        """Run one step of each generation: prefill steps one by one, decode steps in one run of the graph.

        Returns for each the text that became final, or the exception it raised; an exception affects no other.
        """
        found: dict[Generation, str | Exception] = {}
        readers = [answer for answer in answers if answer.reading]
        together = [(answer, row) for answer in answers if not answer.reading and isinstance(row := answer.steps, Row)]
        if self._pool is not None and len(together) > 1:
            began = time.perf_counter()
            tokens = [answer.token_ids[-1] for answer, _ in together]
            try:
                logits = self._pool.write([row for _, row in together], tokens)
            except GradmapError:
                pass  # retried one by one below, so that only the failing generation reports the error
            else:
                for (answer, _), own in zip(together, logits, strict=True):
                    found[answer] = _tried(lambda answer=answer, own=own: answer.take(own, began))
        for answer in answers:
            if not answer.reading and answer not in found:
                found[answer] = _tried(answer.advance)
        self._read(readers, answers, found)
        return [found[answer] for answer in answers]

    def _read(
        self, readers: Sequence[Generation], answers: Sequence[Generation], found: dict[Generation, str | Exception]
    ) -> None:
        """Run the prefill steps of a round."""
        ready = [answer for answer in readers if not self._waits(answer, answers)]
        found |= dict.fromkeys(readers, "")
        left: float = float("inf")
        if self._in_turn:
            left = generating.PREFILL_TOKENS if len(readers) == len(answers) else PREFILL_BESIDE
            self._rounds += 1
            # The shortest first, as it is soon done; the oldest in every second round, so that it comes to an end.
            if self._rounds % 2:
                ready.sort(key=lambda answer: answer.unread)
        for place, answer in enumerate(ready):
            if place and left < _LEAST:
                break
            before = answer.unread
            most = int(min(left, generating.PREFILL_TOKENS))
            found[answer] = _tried(lambda answer=answer, most=most: answer.advance(most))
            left -= before - answer.unread

    def _waits(self, answer: Generation, answers: Sequence[Generation]) -> bool:
        """Let a prompt begin where other texts have come to; return whether an earlier one is still reading what both
        begin with, so that it pays to wait."""
        if self._prefixes is None or not answer.resumable:
            return False
        tokens = answer.prompt[:-2]  # see `Generation.advance`
        best: list[KeysValues] = []
        count = 0
        for other in answers[: answers.index(answer)]:
            common = common_prefix(tokens, other.prompt)
            if other.steps is None or common < BLOCK:
                continue
            if other.read < common:
                return True
            if common > count:
                count, best = common, [other.steps.kept(0, common)]
        blocks = self._prefixes.find(tokens)
        if tokens_of(blocks) > count:
            best = blocks
        if best:
            answer.resume(best)
        return False


def _tried(action: Callable[[], str]) -> str | Exception:
    try:
        return action()
    except Exception as error:
        return error
