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

# Prompt tokens prefilled per round while other generations decode: they wait for the prefill between two tokens.
PREFILL_BESIDE = 64
_LEAST = 16  # fewer tokens take nearly as long


class Batch:
    """Generations of one model, decoded together if the graph supports it (see pool.py).

    Each yields the same tokens as on its own. Not thread-safe.

    Args:
        model: creates the generations.
        session: the loaded graph of the model.
        rows: maximum number of generations at the same time.
        prefix_cache: bytes for the keys and values of finished texts. A prompt that begins like one of them, or like a
            running text, reuses what they have in common. 0: running texts only; None: every prompt is prefilled in
            full.
        in_turn: limit the prompt tokens per round, so that other generations continue to decode; otherwise every
            prompt takes a prefill step in each round.
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
        """Size in bytes of the stored keys and values of finished texts."""
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
        """Run one step of each generation: prefill steps one by one, decode steps in one run if the graph supports it.

        Returns, in the same order, the text of each that became final, or the exception it raised; an exception affects
        no other generation.
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
            # The shortest first, because it is done soon; in every second round the oldest, so that it gets done too.
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
        """Start a prompt with the longest prefix that a running or finished text has computed. Return True to wait
        instead, because an earlier generation is still prefilling a common prefix."""
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
