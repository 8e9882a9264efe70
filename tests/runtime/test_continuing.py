"""Continuing the last message, against transformers; and answers that must not end too soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradmap_hub import runtime
from gradmap_hub.runtime import PromptError, Sampling
from gradmap_hub.runtime.continuing import cut_after
from gradmap_hub.runtime.prompting import ModelError, render_chat

USER = {"role": "user", "content": "Say a word."}
STRIPPING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
KEEPING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def model(published: Path) -> Any:
    return runtime.load(published)


@pytest.mark.parametrize("content", ["The word is", "The word is ", " The word", "Say a word.", "word\n", "é 🦊"])
@pytest.mark.parametrize("template", [STRIPPING, KEEPING])
def test_the_cut_is_that_of_transformers(tiny: Any, template: str, content: str) -> None:
    from transformers import AutoTokenizer

    turns = [USER, {"role": "assistant", "content": content}]
    theirs = AutoTokenizer.from_pretrained(tiny.original).apply_chat_template(
        turns, chat_template=template, tokenize=False, continue_final_message=True
    )
    assert cut_after(render_chat(template, turns, {}, {"add_generation_prompt": False}), content) == theirs


@pytest.mark.parametrize("content", ["", "  ", "never written"])
def test_a_message_that_the_template_does_not_write_is_refused(content: str) -> None:
    with pytest.raises(ModelError, match="cannot be continued"):
        cut_after("<user>Hi</user>", content)


def test_the_prompt_ends_where_it_is_asked_to(model: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "The word is"}]
    text = model.decode(model.encode_chat(turns))
    assert text.endswith("<s>assistant:")
    assert text.removesuffix("<s>assistant:") == model.decode(model.encode_chat(turns, add_generation_prompt=False))
    assert model.decode(model.encode_chat(turns, continue_final_message=True)).endswith("assistant: The word is")
    with pytest.raises(PromptError, match="cannot be continued"):
        model.encode_chat([{"role": "user", "content": ""}], continue_final_message=True)


def ran(model: Any, **options: Any) -> Any:
    answer = model.start(model.encode("The capital"), max_tokens=20, **options)
    list(answer)
    return answer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_before_the_minimum(model: Any, temperature: float) -> None:
    ends = {token: 100.0 for token in model.end_ids}
    sampling = Sampling(temperature, seed=1, logit_bias=ends)  # ends at once if it may
    assert ran(model, sampling=sampling).token_ids == []
    answer = ran(model, sampling=sampling, min_tokens=7)
    assert len(answer.token_ids) == 7 and answer.finish_reason == "stop"
    ignoring = ran(model, sampling=sampling, ignore_end=True)
    assert set(ignoring.token_ids) == set(ends) and ignoring.finish_reason == "length"


def test_no_stop_string_before_the_minimum(model: Any) -> None:
    whole = ran(model, ignore_end=True)
    stop = whole.text[0]
    assert ran(model, ignore_end=True, stop=[stop]).text == ""
    answer = ran(model, ignore_end=True, stop=[stop], min_tokens=5)
    assert len(answer.token_ids) >= 5 and whole.text.startswith(answer.text) and answer.text
