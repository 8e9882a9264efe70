"""Text that a model writes itself: by its own template, seeded, and filtered."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import CalibrationError
from gradmap_hub.healing import self_text
from gradmap_hub.healing.self_text import Drafts, SelfTextRecipe, write_self_text
from gradmap_hub.measurements import BeforeAfter, Measured, Sample, repeated_share

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# A random model writes noise: nothing of it repeats.
RECIPE = SelfTextRecipe(batch=8, question_tokens=8, answer_tokens=24, least_tokens=4)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


def test_a_chat_model_asks_and_answers(chat: Any, model_of: Callable[..., Any]) -> None:
    counted: list[int] = []
    found = write_self_text(model_of("llama"), chat, 600, RECIPE, counted.append)
    assert 600 <= found.tokens < 700 and sum(counted) == found.tokens
    for text in found.samples:
        assert text.startswith("<s>user: ") and "</s><s>assistant: " in text and text.endswith("</s>")
    assert found.drawn == len(found.samples) + found.repetitive + found.short + found.duplicates


def test_a_template_without_an_opening(chat: Any, model_of: Callable[..., Any]) -> None:
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert write_self_text(model_of("llama"), chat, 200, RECIPE).samples


def test_two_draws_of_a_seed_are_the_same(chat: Any, model_of: Callable[..., Any]) -> None:
    import torch

    model = model_of("llama")
    first = write_self_text(model, chat, 300, RECIPE)
    state = torch.random.get_rng_state()
    assert write_self_text(model, chat, 300, RECIPE) == first
    assert torch.equal(torch.random.get_rng_state(), state)  # the generators of the process are left alone
    other = write_self_text(model, chat, 300, SelfTextRecipe(**(RECIPE.settings() | {"seed": 1})))
    assert not set(other.samples) & set(first.samples)


def test_what_was_written_before_an_interruption_is_kept(
    chat: Any, model_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = model_of("llama"), tmp_path / "drafts"
    whole = write_self_text(model, chat, 1200, RECIPE)
    write, batches = self_text._conversations, []

    def interrupted(*arguments: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(write(*arguments))
        return batches[-1]

    monkeypatch.setattr(self_text, "_conversations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_self_text(model, chat, 1200, RECIPE, drafts=Drafts(file, "key"))
    with file.open("ab") as stream:
        stream.write(b'[["a text that was not wri')
    assert Drafts(file, "key").read() == batches and file.read_bytes().endswith(b"\n")
    monkeypatch.setattr(self_text, "_conversations", write)
    counted: list[int] = []
    assert write_self_text(model, chat, 1200, RECIPE, counted.append, Drafts(file, "key")) == whole
    assert sum(counted) == whole.tokens  # the progress starts where the first call ended
    assert Drafts(file, "another model").read() == []


@pytest.mark.parametrize("missing", ["nothing", "bos_token", "all"])
def test_a_base_model_goes_on_from_its_first_token(missing: str, tokenizer: Any, model_of: Callable[..., Any]) -> None:
    base = copy.deepcopy(tokenizer)
    for name in {"nothing": (), "bos_token": ("bos_token",), "all": ("bos_token", "eos_token", "pad_token")}[missing]:
        setattr(base, name, None)
    found = write_self_text(model_of("gemma"), base, 300, RECIPE)
    assert found.tokens >= 300 and all("assistant" not in text for text in found.samples)


def test_repetitions_and_near_duplicates_are_dropped(
    chat: Any, model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"word{number}" for number in range(60)]
    loop, text, near = " ".join(["round and round it goes"] * 12), " ".join(words), " ".join(["another", *words[1:]])
    other = " ".join(f"term{number}" for number in range(60))
    drawn = [(sample, sample) for sample in (loop, text, near, "no", other)]
    monkeypatch.setattr(self_text, "_conversations", lambda *_: drawn)
    enough = sum(len(chat(sample, add_special_tokens=False)["input_ids"]) for sample in (text, other))
    found = write_self_text(model_of("llama"), chat, enough, RECIPE)
    assert found.samples == [text, other]
    assert (found.drawn, found.repetitive, found.duplicates, found.short) == (5, 1, 1, 1)


def test_a_model_that_only_repeats_itself_is_refused(
    chat: Any, model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        self_text, "sample", lambda _m, _t, prompts, *_, **__: ["on and on and on and on " * 5] * len(prompts)
    )
    with pytest.raises(CalibrationError, match="0 pass the filters"):
        write_self_text(model_of("llama"), chat, 1000, RECIPE)


def test_a_template_that_fails_is_one_line(chat: Any, model_of: Callable[..., Any]) -> None:
    chat.chat_template = "{{ raise_exception('Only\\nsystem turns') }}"
    with pytest.raises(CalibrationError, match="chat template failed: Only") as caught:
        write_self_text(model_of("llama"), chat, 1000, RECIPE)
    assert "\n" not in caught.value.message


def test_repeated_share() -> None:
    assert repeated_share("a b c d e f g") == 0 == repeated_share("a b")
    assert repeated_share("a b c d a b c d a b c d") == pytest.approx(5 / 9)


def test_repetition_of_a_folder_is_the_mean_of_its_answers() -> None:
    """What card and terminal say of greedy answers."""
    loop, prose = "a b c d a b c d a b c d", "a b c d e f g"
    measured = Measured(
        "1", "", "original", None, "", BeforeAfter(1, 1), "float32", [],
        samples=[Sample("?", prose, loop), Sample("?", prose, prose)],
    )  # fmt: skip
    assert measured.repeated == (0, pytest.approx(5 / 18))
    assert dataclasses.replace(measured, samples=[]).repeated is None
