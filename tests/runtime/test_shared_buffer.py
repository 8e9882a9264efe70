"""A graph of GenAI's builder, whose cache is one buffer for past and present, against transformers and Optimum's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub import runtime
from gradmap_hub.errors import GradmapError
from gradmap_hub.exporters import genai
from gradmap_hub.exporters.graph import Graph
from gradmap_hub.exporters.quantized import quantise
from gradmap_hub.exporters.recipes import INT4, INT8
from gradmap_hub.runtime import TextModel, generation
from gradmap_hub.runtime.pool import RowPool

PROMPTS = ("The capital of France is Paris, and the", "Gravity pulls", "A paper clip holds sheets " * 6)


@pytest.fixture(scope="module")
def folder(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="of the extra onnx; beside transformers 5 it is in another environment")
    root = tmp_path_factory.mktemp("shared")
    folder = Path(shutil.copytree(published, root / "tiny"))
    Graph.load(genai.build(folder, root / "built")).save(folder / "onnx" / "model_genai.onnx")
    for name, recipe in {"int8": INT8[0], "int4": INT4[0]}.items():
        quantise(folder / "onnx" / "model_genai.onnx", folder / "onnx" / f"model_{name}.onnx", recipe, None)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[TextModel, TextModel]:
    return runtime.load(folder, artifact="genai"), runtime.load(folder, artifact="fp32")


def tokens(model: TextModel, prompt: str, count: int = 48) -> list[int]:
    answer = model.start(model.encode(prompt), max_tokens=count)
    for _ in answer:
        pass
    return answer.token_ids


def test_the_buffer_is_shared_and_the_tokens_are_equal(both: tuple[TextModel, TextModel]) -> None:
    shared, growing = both
    assert shared._session.shares_buffer and not growing._session.shares_buffer
    assert shared.artifact == "onnx/model_genai.onnx"
    for prompt in PROMPTS:
        assert tokens(shared, prompt) == tokens(growing, prompt)


def test_prompts_read_in_parts_and_answers_in_turn(
    both: tuple[TextModel, TextModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, growing = both
    wanted = [tokens(growing, prompt, 20) for prompt in PROMPTS]
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 5)
    answers = [shared.start(shared.encode(prompt), max_tokens=20) for prompt in PROMPTS]
    while any(answer.finish_reason is None for answer in answers):
        for answer in answers:
            answer.advance()
    assert [answer.token_ids for answer in answers] == wanted


def test_losses_agree(both: tuple[TextModel, TextModel], monkeypatch: pytest.MonkeyPatch) -> None:
    shared, growing = both
    ids: Any = shared.encode(PROMPTS[2])
    wanted = growing.losses(ids)
    assert shared.losses(ids) == pytest.approx(wanted, abs=1e-3)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    assert shared.losses(ids) == pytest.approx(wanted, abs=1e-3)


def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of a pool covers from now on."""
    counts: list[int] = []
    run = RowPool._run

    def counted(pool: RowPool, first: int, count: int, *inputs: Any) -> Any:
        counts.append(count)
        return run(pool, first, count, *inputs)

    monkeypatch.setattr(RowPool, "_run", counted)
    return counts


@pytest.mark.parametrize(("artifact", "threads"), [("genai", 1), ("int8", 2), ("int4", 1)])
def test_a_batch_gives_each_the_tokens_that_it_gets_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, artifact: str, threads: int
) -> None:
    """Answers come and go while others are being written, prompts are read in parts in between."""
    shared = runtime.load(folder, artifact=artifact, threads=threads)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 5)
    asked = [(PROMPTS[number % 3] + " again" * (number % 4), 3 + 7 * number % 40) for number in range(14)]
    wanted = [tokens(shared, *one) for one in asked]
    steps = together(monkeypatch)
    batch = shared.batch(4)
    coming = [(number, *one) for number, one in enumerate(asked)]
    running: dict[int, Any] = {}
    found: dict[int, list[int]] = {}
    for turn in range(500):
        if coming and len(running) < 4 and turn % 2 == 0:
            number, prompt, count = coming.pop(0)
            running[number] = batch.start(shared.encode(prompt), max_tokens=count)
        if turn == 9:  # somebody goes away in the middle
            running.pop(next(iter(running))).cancel()
        said = batch.step(list(running.values()))
        assert all(isinstance(piece, str) for piece in said)
        found |= {number: answer.token_ids for number, answer in running.items() if answer.finish_reason}
        running = {number: answer for number, answer in running.items() if not answer.finish_reason}
        if not coming and not running:
            break
    assert len(found) == 13 and all(found[number] == wanted[number] for number in found)
    assert max(steps) == 4
    assert batch._pool is not None and not batch._pool._buffers  # an idle batch holds no cache
    with pytest.raises(IndexError):
        [batch.start([5], max_tokens=3) for _ in range(5)]


def test_what_fails_together_is_tried_alone(both: tuple[TextModel, TextModel], monkeypatch: pytest.MonkeyPatch) -> None:
    shared, _ = both
    wanted = [tokens(shared, prompt, 12) for prompt in PROMPTS]
    batch = shared.batch(3)
    answers = [batch.start(shared.encode(prompt), max_tokens=12) for prompt in PROMPTS]
    run = RowPool._run

    def only_alone(pool: RowPool, first: int, count: int, *inputs: Any) -> Any:
        if count > 1:
            raise GradmapError("out of memory")
        return run(pool, first, count, *inputs)

    monkeypatch.setattr(RowPool, "_run", only_alone)
    while any(answer.finish_reason is None for answer in answers):
        assert all(isinstance(piece, str) for piece in batch.step(answers))
    assert [answer.token_ids for answer in answers] == wanted
    broken = batch.start([5, 6], max_tokens=4)
    monkeypatch.setattr(RowPool, "_run", lambda *_: (_ for _ in ()).throw(GradmapError("no more")))
    [said] = batch.step([broken])
    assert isinstance(said, GradmapError)


def test_a_graph_that_cannot_batch_takes_turns(both: tuple[TextModel, TextModel]) -> None:
    _, growing = both
    batch = growing.batch(3)
    answers = [batch.start(growing.encode(prompt), max_tokens=12) for prompt in PROMPTS]
    while any(answer.finish_reason is None for answer in answers):
        batch.step(answers)
    assert [answer.token_ids for answer in answers] == [tokens(growing, prompt, 12) for prompt in PROMPTS]
