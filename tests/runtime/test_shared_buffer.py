"""A graph of GenAI's builder, whose cache is one buffer for past and present, against transformers and Optimum's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub import runtime
from gradmap_hub.exporters import genai
from gradmap_hub.exporters.graph import Graph
from gradmap_hub.runtime import TextModel, generation

PROMPTS = ("The capital of France is Paris, and the", "Gravity pulls", "A paper clip holds sheets " * 6)


@pytest.fixture(scope="module")
def both(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextModel, TextModel]:
    pytest.importorskip("onnx", reason="of the extra onnx; beside transformers 5 it is in another environment")
    root = tmp_path_factory.mktemp("shared")
    folder = Path(shutil.copytree(published, root / "tiny"))
    Graph.load(genai.build(folder, root / "built")).save(folder / "onnx" / "model_genai.onnx")
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
