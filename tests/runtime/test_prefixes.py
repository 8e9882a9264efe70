"""Prompts that begin as others did, and rounds in which prompts are read beside answers that are written."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradmap_hub import runtime
from gradmap_hub.runtime import Scoring, TextModel, batch, generation
from gradmap_hub.runtime.pool import RowPool
from gradmap_hub.runtime.prefixes import BLOCK, PrefixCache, common_prefix, tokens_of

SYSTEM = list(range(5, 5 + 3 * BLOCK))
MUCH = 1 << 30


class Cache:
    """Keys and values that say which text they are of; counts how many tokens of them were asked for."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens)
        self.asked = 0

    def kept(self, start: int, stop: int) -> list[np.ndarray]:
        self.asked += stop - start
        return [np.tile(self.tokens[None, start:stop, None], (2, 1, 3)).astype(np.float32)]


def stored(cache: PrefixCache, tokens: list[int]) -> int:
    """How many tokens had to be copied."""
    text: Any = Cache(tokens)
    cache.store(text.tokens, text)
    return text.asked


def known(cache: PrefixCache, tokens: list[int]) -> int:
    """How many of the first tokens are there, with the right keys and values."""
    found = cache.find(np.array(tokens))
    if found:
        whole = np.concatenate([part[0] for part in found], axis=1)
        assert whole.shape[1] == tokens_of(found) and (whole == np.array(tokens)[: whole.shape[1], None]).all()
    return tokens_of(found)


def test_texts_share_their_blocks() -> None:
    cache = PrefixCache(MUCH)
    assert stored(cache, [*SYSTEM, 1, 2, 3]) == len(SYSTEM)
    assert stored(cache, [*SYSTEM, *range(BLOCK)]) == BLOCK
    assert cache.bytes == 4 * BLOCK * 2 * 3 * 4
    assert known(cache, [*SYSTEM, *range(BLOCK), 9]) == 4 * BLOCK
    assert known(cache, [*SYSTEM, 7] * 2) == 3 * BLOCK
    assert known(cache, [6, *SYSTEM]) == known(cache, SYSTEM[BLOCK:]) == 0  # a block belongs to what is before it
    assert stored(cache, SYSTEM[: BLOCK - 1]) == 0


def test_the_budget_holds_and_the_oldest_goes_first() -> None:
    block = BLOCK * 2 * 3 * 4
    cache = PrefixCache(4 * block)
    texts = [[number] * (2 * BLOCK) for number in range(3)]
    for text in texts[:2]:
        stored(cache, text)
    known(cache, texts[0])
    stored(cache, texts[2])
    assert cache.bytes == 4 * block
    assert [known(cache, text) for text in texts] == [2 * BLOCK, 0, 2 * BLOCK]
    assert stored(cache, [9] * (9 * BLOCK)) and known(cache, [9] * (9 * BLOCK)) == 4 * BLOCK  # as much as fits
    assert stored(PrefixCache(0), SYSTEM) == 0 and stored(PrefixCache(block - 1), SYSTEM) and cache.bytes == 4 * block


def test_any_order_of_texts_keeps_the_budget() -> None:
    chance = random.Random(0)
    block = BLOCK * 2 * 3 * 4
    cache = PrefixCache(7 * block)
    for _ in range(300):
        text = [chance.randrange(2)] * (BLOCK * chance.randrange(1, 4)) + [chance.randrange(3)] * chance.randrange(150)
        known(cache, text)
        stored(cache, text)
        assert cache.bytes == block * len(cache._blocks) <= 7 * block
        assert known(cache, text) == len(text) // BLOCK * BLOCK or cache.bytes == 7 * block


def test_the_common_beginning() -> None:
    for first, second, wanted in (([1, 2], [1, 2, 3], 2), ([], [1], 0), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)):
        assert common_prefix(np.array(first, dtype=int), np.array(second)) == wanted


@pytest.fixture(scope="module", params=["fp32", "genai"])
def model(request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    if request.param == "fp32":
        return runtime.load(published, threads=1)
    pytest.importorskip("onnx", reason="of the extra onnx; beside transformers 5 it is in another environment")
    from gradmap_hub.exporters import genai
    from gradmap_hub.exporters.graph import Graph

    folder = tmp_path_factory.mktemp("prefixes")
    for file in published.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "onnx").mkdir()
    Graph.load(genai.build(published, folder / "built")).save(folder / "onnx" / "model_genai.onnx")
    return runtime.load(folder, artifact="genai", threads=1)


def alone(model: TextModel, ids: list[int], count: int = 12) -> list[int]:
    answer = model.start(ids, max_tokens=count, ignore_end=True)
    list(answer)
    return answer.token_ids


def run(batch: Any, *answers: Any) -> None:
    while any(answer.finish_reason is None for answer in answers):
        for said in batch.step([answer for answer in answers if answer.finish_reason is None]):
            assert isinstance(said, str), said


def test_the_next_turn_and_a_shared_beginning(model: TextModel) -> None:
    together = model.batch(3, prefix_cache=MUCH, in_turn=True)
    first = together.start([*SYSTEM, 9, 8], max_tokens=12, ignore_end=True)
    run(together, first)
    turns = [[*SYSTEM, 9, 8, *first.token_ids, *range(50)], [*SYSTEM, *range(70)], [4, *SYSTEM]]
    answers = [together.start(turn, max_tokens=12, ignore_end=True) for turn in turns]
    run(together, *answers)
    assert [answer.cached_tokens for answer in answers] == [len(SYSTEM), len(SYSTEM), 0]
    assert [answer.token_ids for answer in answers] == [alone(model, turn) for turn in turns]
    again = together.start(turns[0], max_tokens=12, ignore_end=True)
    run(together, again)
    assert again.cached_tokens == (len(turns[0]) - 2) // BLOCK * BLOCK and again.token_ids == answers[0].token_ids


def test_one_prompt_is_read_once(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one prompt, while it is being read, and later, when it is being continued."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 40)
    together = model.batch(5, prefix_cache=0, in_turn=True)
    prompt = [*SYSTEM, 1, 2, 3]
    answers = [together.start(prompt, max_tokens=30, ignore_end=True) for _ in range(4)]
    for _ in range(8):
        together.step(answers)
    late = together.start([*prompt, 4, 5, 6], max_tokens=9, ignore_end=True)
    run(together, *answers, late)
    assert [answer.cached_tokens for answer in (*answers, late)] == [0, *[len(prompt) - 2] * 3, len(prompt)]
    assert [answer.token_ids for answer in answers] == [alone(model, prompt, 30)] * 4
    assert late.token_ids == alone(model, [*prompt, 4, 5, 6], 9) and together.prefix_bytes == 0


def test_who_waits_goes_on_if_the_other_leaves(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 40)
    together = model.batch(2, prefix_cache=0, in_turn=True)
    first, second = (together.start([*SYSTEM, 1, 2, 3], max_tokens=5, ignore_end=True) for _ in range(2))
    together.step([first, second])
    assert first.read == 40 and second.read == 0
    first.cancel()
    run(together, second)
    assert second.token_ids == alone(model, [*SYSTEM, 1, 2, 3], 5) and second.cached_tokens == 0


def test_a_scored_prompt_is_computed_and_kept(model: TextModel) -> None:
    together = model.batch(1, prefix_cache=MUCH)
    for _ in range(2):
        answer = together.start(SYSTEM, max_tokens=2, scoring=Scoring(prompt=True), ignore_end=True)
        run(together, answer)
        assert answer.cached_tokens == 0 and len(answer.take_scores()) == len(SYSTEM) + 2
    answer = together.start(SYSTEM, max_tokens=2, ignore_end=True)
    run(together, answer)
    assert answer.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize("size", [2, 3, 7, 95, 96, 97])
def test_no_part_of_a_prompt_is_a_single_token(model: TextModel, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(generation, "PREFILL_TOKENS", size)
    for count in (1, 2, 3, 4, 95, 96, 97):
        answer = model.start(list(range(count)), max_tokens=1)
        left = [answer.unread]
        while answer.reading:
            answer.advance()
            left.append(answer.unread)
        parts = [before - after for before, after in itertools.pairwise(left)]
        assert sum(parts) == count and max(parts) <= max(size, 3) and (count == 1 or min(parts) > 1)


def test_prompts_do_not_hold_up_those_who_write(model: TextModel) -> None:
    """Beside an answer that is written, a round reads few tokens; a short prompt passes a long one."""
    together = model.batch(3, in_turn=True)
    writing = together.start([5, 6], max_tokens=40, ignore_end=True)
    together.step([writing])
    long, short = (together.start(ids, max_tokens=3, ignore_end=True) for ids in ([7] * 400, [8] * 30))
    answers = [writing, long, short]
    while long.reading:
        before = long.unread + short.unread, writing.completion_tokens
        together.step([answer for answer in answers if answer.finish_reason is None])
        assert before[0] - long.unread - short.unread <= batch.PREFILL_BESIDE
        assert writing.completion_tokens == before[1] + 1
    assert short.finish_reason == "length" and long.completion_tokens <= 1
    run(together, *(answer for answer in answers if answer.finish_reason is None))
    assert long.token_ids == alone(model, [7] * 400, 3) and short.token_ids == alone(model, [8] * 30, 3)


def test_the_memory_of_a_row_is_given_back(model: TextModel) -> None:
    if not model._session.batches:
        pytest.skip("this graph has no rows")
    pool = RowPool(model._session, 3, 1024)
    rows = [pool.take() for _ in range(3)]
    for row in rows:
        pool.read(row, SYSTEM)
    wanted = [tensor.copy() for tensor in rows[2].kept(0, len(SYSTEM))]
    pool.give_back(rows[0])  # the last one moves
    assert all((tensor == own).all() for tensor, own in zip(rows[2].kept(0, len(SYSTEM)), wanted, strict=True))
    assert rows[2].index == 0
    buffer = next(iter(pool._buffers.values()))
    assert not buffer[2].any() and buffer[1].any()
