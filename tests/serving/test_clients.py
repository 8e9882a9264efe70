"""What clients of other servers send: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TURNS = [{"role": "user", "content": "Explain gravity."}]
PROMPT = "The capital of France"


@pytest.fixture(scope="module")
def web(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def asked(web: httpx.Client, kit: Any, route: str, **body: Any) -> Any:
    answer = web.post(route, json={"model": kit.name, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(web: httpx.Client, kit: Any, route: str, **body: Any) -> Any:
    answer = web.post(route, json={"model": kit.name, "max_tokens": 4, **body})
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    return answer.json()["error"]


# -- the end of an answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_both_names_of_the_maximum(web: httpx.Client, kit: Any, route: str) -> None:
    given = {"messages": TURNS, "prompt": PROMPT}
    for options in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        assert asked(web, kit, route, **given, **options)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_ignore_eos_and_min_tokens(web: httpx.Client, model: Any, kit: Any, route: str) -> None:
    ending = {"logit_bias": {str(token): 100 for token in model.end_ids}, "max_tokens": 12}
    body = {"messages": TURNS, "prompt": PROMPT} | ending

    def outcome(**options: Any) -> tuple[int, str]:
        answer = asked(web, kit, route, **body, **options)
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    assert outcome() == outcome(ignore_eos=False, min_tokens=0) == (0, "stop")
    assert outcome(min_tokens=5) == (5, "stop")
    assert outcome(min_tokens=12) == (12, "length")
    assert outcome(ignore_eos=True) == (12, "length")
    assert refusal(web, kit, route, **body, min_tokens=13)["param"] == "min_tokens"
    assert refusal(web, kit, route, **body, min_tokens=-1)["param"] == "min_tokens"
    assert refusal(web, kit, route, **body, ignore_eos="yes")["param"] == "ignore_eos"


# -- the end of a prompt -------------------------------------------------------------------------------------------


def test_continuing_the_last_message(web: httpx.Client, model: Any, kit: Any) -> None:
    turns = [*TURNS, {"role": "assistant", "content": "An apple falls"}]
    for begin in (False, None):
        answer = asked(
            web, kit, CHAT, messages=turns, max_tokens=8, continue_final_message=True, add_generation_prompt=begin
        )
        ids = model.encode_chat(turns, continue_final_message=True)
        assert answer["choices"][0]["message"]["content"] == kit.alone(model, ids, 8)
        assert answer["usage"]["prompt_tokens"] == len(ids) < len(model.encode_chat(turns))
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(web, kit, CHAT, messages=turns, **both)["param"] == "continue_final_message"
    empty = [*TURNS, {"role": "assistant", "content": ""}]
    assert refusal(web, kit, CHAT, messages=empty, continue_final_message=True)["param"] == "messages"


def test_no_generation_prompt(web: httpx.Client, model: Any, kit: Any) -> None:
    answer = asked(web, kit, CHAT, messages=TURNS, max_tokens=8, add_generation_prompt=False)
    ids = model.encode_chat(TURNS, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"] == kit.alone(model, ids, 8)


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
def test_a_completion_has_no_template(web: httpx.Client, kit: Any, name: str) -> None:
    error = refusal(web, kit, PLAIN, prompt=PROMPT, **{name: True})
    assert error["param"] == name and error["code"] == "unsupported_parameter"
