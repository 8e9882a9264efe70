"""Chat templates in a process with limits: the same prompts, and no template that holds up or fills this process."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gradmap_hub.errors import CalibrationError
from gradmap_hub.evaluation.samples import prompt_ids
from gradmap_hub.healing.self_text import render as render_self_text
from gradmap_hub.runtime import chat, prompting
from gradmap_hub.runtime.prompting import LimitedRenderer, ModelError, render_chat
from gradmap_hub.runtime.text_model import PromptError

MESSAGES = [{"role": "user", "content": "Grüße 🦊 \u2028 <b>\n"}]
TOKENS = {"bos_token": "<s>"}
HONEST = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
LARGE = {
    "a multiple": "{{ 'a' * 10000000000 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a width": "{{ '%099999999999d' % 1 }}",
    "a long prompt": "{{ 'a' * 40000000 }}",
}


def _end(renderer: LimitedRenderer) -> None:
    """End the process of a renderer."""
    if renderer._worker is not None:
        renderer._worker.kill()
        renderer._worker.wait()


@pytest.fixture
def render() -> Iterator[LimitedRenderer]:
    renderer = LimitedRenderer()
    yield renderer
    _end(renderer)


def test_prompts_and_errors_are_those_of_the_template(render: LimitedRenderer) -> None:
    for _ in range(2):
        assert render(HONEST, MESSAGES, TOKENS) == render_chat(HONEST, MESSAGES, TOKENS)
        with pytest.raises(ModelError, match="failed: roles must alternate"):
            render("{{ raise_exception('roles must alternate') }}", MESSAGES, TOKENS)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_does_not_fill_the_memory(name: str, render: LimitedRenderer) -> None:
    with pytest.raises(ModelError, match="chat template failed"):
        render(LARGE[name], MESSAGES, TOKENS)
    assert render(HONEST, MESSAGES, TOKENS).startswith("<s>")


def test_a_template_without_end_is_stopped(render: LimitedRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    render(HONEST, MESSAGES, TOKENS)  # starts the process, which may take longer than the watch waits below
    monkeypatch.setattr(prompting, "_SLOWDOWN", 0.05)  # the watch ends it before its own timer does
    began = time.monotonic()
    with pytest.raises(ModelError, match="more than 5 seconds"):
        render(ENDLESS, MESSAGES, TOKENS)
    assert time.monotonic() - began < 3
    monkeypatch.undo()
    assert render(HONEST, MESSAGES, TOKENS).startswith("<s>")


@pytest.fixture
def templated(tokenizer: Any) -> Callable[[str | dict[str, str]], Any]:
    """A tokenizer of transformers with another template."""

    def make(template: str | dict[str, str]) -> Any:
        found = copy.deepcopy(tokenizer)
        found.chat_template = template
        return found

    return make


def test_evaluate_and_heal_render_as_transformers_does(templated: Callable[..., Any]) -> None:
    template = HONEST + "{% if add_generation_prompt %}{{ eos_token }}assistant{% endif %}"
    for given in (template, {"tools": "no", "default": template}):
        tokenizer = templated(given)
        for answer in (True, False):
            expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer)
            assert chat.chat_text(tokenizer, MESSAGES, answer=answer) == expected
        turn = [{"role": "user", "content": "Hello \u2063"}]
        expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, turn[0]["content"]) == expected
    with pytest.raises(PromptError, match="no default chat template"):
        chat.chat_text(templated({"tools": "no"}), MESSAGES)


def test_evaluate_and_heal_are_limited_as_the_runtime_is(templated: Callable[..., Any]) -> None:
    tokenizer = templated(LARGE["a multiple"])
    with pytest.raises(PromptError, match="chat template failed"):
        prompt_ids(tokenizer, "Hello")
    with pytest.raises(CalibrationError, match="chat template failed"):
        render_self_text(tokenizer, [{"role": "user", "content": "Hello"}])


@pytest.mark.slow
def test_the_worker_ends_itself_where_nobody_watches(render: LimitedRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompting, "_SLOWDOWN", 60)
    with pytest.raises(ModelError, match="more than 5 seconds"):
        render(ENDLESS, MESSAGES, TOKENS)


def test_threads_take_turns_and_a_dead_worker_is_replaced(render: LimitedRenderer) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(8)}
    _end(render)
    assert render(HONEST, MESSAGES, TOKENS).startswith("<s>")


def test_the_worker_ends_with_the_renderer() -> None:
    renderer = LimitedRenderer()
    renderer(HONEST, MESSAGES, TOKENS)
    worker = renderer._worker
    assert worker is not None and worker.poll() is None
    del renderer
    gc.collect()
    assert worker.poll() is not None


def test_an_interrupted_call_leaves_no_answer_for_the_next(render: LimitedRenderer) -> None:
    render(HONEST, MESSAGES, TOKENS)
    worker = render._worker
    assert worker is not None

    class Interrupted:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    worker.stdout = Interrupted()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        render("the answer that nobody reads", MESSAGES, TOKENS)
    assert worker.poll() is not None
    assert render(HONEST, MESSAGES, TOKENS).startswith("<s>")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_fork_has_a_worker_of_its_own(render: LimitedRenderer) -> None:
    """ZeroGPU runs each request in a fork; two of them must not read each other's prompts."""
    render(HONEST, MESSAGES, TOKENS)
    worker = render._worker
    assert worker is not None
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def in_a_fork() -> None:
        text = render(HONEST, MESSAGES, TOKENS)
        other = render._worker
        assert other is not None
        theirs.send((text, other.pid))
        _end(render)

    with render._lock:  # held by a thread that the fork does not have
        process = multiprocessing.get_context("fork").Process(target=in_a_fork)
        process.start()
        assert ours.poll(20)
        text, pid = ours.recv()
    process.join()
    assert text == render(HONEST, MESSAGES, TOKENS)
    assert pid != worker.pid and worker.poll() is None
