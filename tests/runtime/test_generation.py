"""A real tiny model in ONNX Runtime, against transformers' `generate` on the same checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub import runtime
from gradmap_hub.errors import GradmapError, SourceError, UsageError
from gradmap_hub.runtime import Sampling, TextModel, generation

PROMPT = "The capital of France is Paris, and the"


@pytest.fixture(scope="module")
def model(published: Path) -> TextModel:
    return runtime.load(published)


@pytest.fixture(scope="module")
def reference(tiny: Any) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of transformers, without those of the prompt and the end."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny.original).eval()

    def tokens(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        found = out[0, len(prompt) :].tolist()
        return found[:-1] if found[-1] == 2 else found

    return tokens


def test_greedy_tokens_are_those_of_transformers(model: TextModel, reference: Callable[..., list[int]]) -> None:
    ids = model.encode(PROMPT)
    answer = model.start(ids, max_tokens=96)
    pieces = list(answer)
    assert answer.token_ids == reference(ids, 96) and len(answer.token_ids) > 8
    assert "".join(pieces) == answer.text
    assert answer.finish_reason in ("stop", "length")
    assert answer.prompt_tokens == len(ids) and answer.completion_tokens == len(answer.token_ids)
    assert answer.first_token_seconds and answer.tokens_per_second


def test_a_prompt_read_in_parts_gives_the_same(
    model: TextModel, reference: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.encode(PROMPT * 5)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    answer = model.start(ids, max_tokens=24)
    parts = -(-len(ids) // 7)
    assert [answer.advance() for _ in range(parts - 1)] == [""] * (parts - 1) and not answer.token_ids
    for _ in answer:
        pass
    assert answer.token_ids == reference(ids, 24)


def test_answers_in_turn_do_not_touch_each_other(model: TextModel, reference: Callable[..., list[int]]) -> None:
    prompts = [model.encode(text) for text in ("A paper clip", "Gravity pulls", PROMPT)]
    answers = [model.start(ids, max_tokens=20) for ids in prompts]
    while any(answer.finish_reason is None for answer in answers):
        for answer in answers:
            answer.advance()
    assert [answer.token_ids for answer in answers] == [reference(ids, 20) for ids in prompts]


def test_a_stop_string_ends_the_answer_before_it(model: TextModel) -> None:
    whole = "".join(model.start(model.encode(PROMPT), max_tokens=40))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    answer = model.start(model.encode(PROMPT), max_tokens=40, stop=[stop, "never in there"])
    assert "".join(answer) == whole[: whole.find(stop)] == answer.text
    assert answer.finish_reason == "stop"


def test_cancelling_frees_the_cache(model: TextModel) -> None:
    answer = model.start(model.encode(PROMPT), max_tokens=40)
    answer.advance()
    answer.cancel()
    text = answer.text
    assert answer.finish_reason == "cancelled" and answer.advance() == "" and answer.text == text
    for piece in model.start(model.encode(PROMPT), max_tokens=40):
        assert piece
        break  # leaving the loop cancels


def test_an_answer_ends_where_the_context_does(published: Path) -> None:
    small = runtime.load(published, context=32)
    ids = small.encode(PROMPT)[:28]
    answer = small.start(ids, max_tokens=500, sampling=Sampling(1.0, seed=1))
    for _ in answer:
        pass
    assert answer.completion_tokens <= 32 - len(ids)
    with pytest.raises(runtime.PromptError, match="32 tokens long") as caught:
        small.start([5] * 32, max_tokens=1)
    assert (caught.value.tokens, caught.value.limit) == (32, 31)
    with pytest.raises(runtime.PromptError, match="at least 1 prompt token"):
        small.start([], max_tokens=1)
    for strange in (-1, small.vocabulary):
        with pytest.raises(runtime.PromptError, match="not a token id"):
            small.start([5, strange], max_tokens=1)


def test_chat_goes_through_the_template(model: TextModel, tiny: Any) -> None:
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 🦊"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Again"},
    ]
    wanted = AutoTokenizer.from_pretrained(tiny.original).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert model.has_chat_template and model.encode_chat(messages) == wanted


def test_a_template_that_raises_is_a_prompt_error(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published, tmp_path / "other")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    model = runtime.load(folder)
    with pytest.raises(runtime.PromptError, match="alternate"):
        model.encode_chat([{"role": "user", "content": "x"}])
    (folder / "chat_template.jinja").unlink()
    plain = runtime.load(folder)
    assert not plain.has_chat_template
    with pytest.raises(runtime.PromptError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "x"}])


def test_losses_are_those_of_transformers(model: TextModel, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = model.encode(PROMPT * 4)
    loaded = AutoModelForCausalLM.from_pretrained(tiny.original).eval()
    with torch.no_grad():
        logits = loaded(torch.tensor([ids])).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()
    assert model.losses(ids) == pytest.approx(wanted, abs=1e-3)
    for size in (1, 7, len(ids) - 1):
        monkeypatch.setattr(generation, "PREFILL_TOKENS", size)
        assert model.losses(ids) == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(runtime.PromptError, match="Losses need"):
        model.losses(ids[:1])


def test_folders_that_cannot_be_run_are_told_apart(published: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        runtime.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no ONNX"):
        runtime.load(tmp_path / "empty")
    broken = shutil.copytree(published, tmp_path / "broken")
    (broken / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(SourceError, match=r"model\.onnx cannot be loaded"):
        runtime.load(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="tokenizer"):
        runtime.load(broken)
    with pytest.raises(UsageError, match="int4"):
        runtime.load(published, artifact="int4")
    with pytest.raises(GradmapError, match="not supported"):
        runtime.load(published, provider="npu")
    with pytest.raises(UsageError, match="threads"):
        runtime.load(published, threads=0)


def run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradmap_hub", "generate", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_the_command_streams_and_reports(published: Path, model: TextModel) -> None:
    ids = model.encode_chat([{"role": "user", "content": PROMPT}])
    wanted = "".join(model.start(ids, max_tokens=12))
    plain = run(str(published), PROMPT, "--max-tokens", "12")
    assert plain.returncode == 0 and plain.stdout == wanted + "\n", plain.stderr
    assert "onnx/model.onnx on CPUExecutionProvider" in plain.stderr
    piped = run(str(published), "--json", "-n", "12", text=PROMPT + "\n")
    assert piped.returncode == 0, piped.stderr
    answer = json.loads(piped.stdout)
    assert answer["text"] == wanted and answer["artifact"] == "onnx/model.onnx"
    assert answer["prompt_tokens"] == len(ids) and answer["completion_tokens"] <= 12
    assert answer["first_token_seconds"] > 0 and answer["provider"] == "CPUExecutionProvider"


def test_a_conversation_remembers(published: Path, model: TextModel) -> None:
    done = run(str(published), "--chat", "-n", "8", text="Gravity\nAgain\n")
    first = "".join(model.start(model.encode_chat([{"role": "user", "content": "Gravity"}]), max_tokens=8))
    messages = [
        {"role": "user", "content": "Gravity"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Again"},
    ]
    second = "".join(model.start(model.encode_chat(messages), max_tokens=8))
    assert done.returncode == 0 and done.stdout == f"{first}\n{second}\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["x", "-n", "0"], 2, "--max-tokens"),
        (["x", "-t", "-1"], 2, "temperature"),
        (["", "--raw"], 2, "empty"),
        (["x", "--raw", "--system", "y"], 2, "--system"),
        (["x", "--chat"], 2, "--chat"),
        (["x", "--artifact", "int4"], 2, "int4"),
        (["x", "--provider", "cuda"], 1, "gpu"),
    ],
)
def test_wrong_requests_get_one_line(published: Path, arguments: list[str], status: int, words: str) -> None:
    done = run(str(published), *arguments)
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
