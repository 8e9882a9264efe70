"""Prompts that begin as earlier ones did: the answers, what is counted, and that it is sooner."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from gradmap_hub.runtime.constraints import ConstraintError
from gradmap_hub.serving.scheduler import CONTEXTS_KEPT

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TEXT = "Gravity pulls. " * 40


def cached(answer: Any) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("which", ["model", "batching"])
@pytest.mark.parametrize("budget", [None, 0])
def test_the_next_turn(which: str, budget: int | None, request: pytest.FixtureRequest, kit: Any) -> None:
    model = request.getfixturevalue(which)
    turns = [{"role": "user", "content": TEXT}]
    with kit.serving(model, prefix_cache=budget) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        first = kit.asked(web, CHAT, messages=turns, max_tokens=20)
        said = first["choices"][0]["message"]["content"]
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "Again."}]
        second = kit.asked(web, CHAT, messages=turns, max_tokens=20)
        assert second["choices"][0]["message"]["content"] == kit.alone(model, model.encode_chat(turns), 20)
        with_it = budget is None
        assert cached(first) == 0 and (cached(second) > 0.7 * first["usage"]["prompt_tokens"]) == with_it
        metrics = web.get("/metrics").text
        assert f"gradmap_prompt_tokens_cached_total {float(cached(second))}" in metrics
        (kept,) = [float(line.split()[1]) for line in metrics.split("\n") if line.startswith("gradmap_prefix_cache_b")]
        assert 0 < kept <= CONTEXTS_KEPT * kit.context * model.cache_bytes if with_it else kept == 0


@pytest.mark.parametrize("which", ["model", "batching"])
def test_choices_need_one_prefill(which: str, request: pytest.FixtureRequest, kit: Any) -> None:
    model = request.getfixturevalue(which)
    with kit.serving(model, prefix_cache=0) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        answer = kit.asked(web, PLAIN, prompt=TEXT, n=5, max_tokens=15)
        assert [each["text"] for each in answer["choices"]] == [kit.alone(model, model.encode(TEXT), 15)] * 5
        tokens = answer["usage"]["prompt_tokens"]
        assert f"gradmap_prompt_tokens_cached_total {4.0 * (tokens - 2)}" in web.get("/metrics").text


@pytest.mark.slow
def test_the_second_turn_starts_sooner(batching: Any, kit: Any) -> None:
    """The tiny model's prefill is cheap; even so the second turn starts in half the time."""
    with kit.serving(batching) as server, httpx.Client(base_url=server.url, timeout=60) as web:

        def seconds(text: str) -> float:
            began = time.perf_counter()
            kit.asked(web, PLAIN, prompt=text, max_tokens=1)
            return time.perf_counter() - began

        first, second = [], []
        for number in range(5):
            text = f"{number}. " + TEXT * 3
            first.append(seconds(text))
            second.append(seconds(text + " And then?"))
    assert sorted(second)[2] < 0.5 * sorted(first)[2]


def test_an_error_of_a_format_names_it(model: Any, kit: Any) -> None:
    """A schema may turn out to be too complex while the answer is written."""

    class Failing:
        finished = False

        def copy(self) -> Failing:
            return self

        def allowed(self, size: int) -> Any:
            raise ConstraintError("too complex")

    class Engine:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def constrain(self, schema: Any) -> Any:
            return Failing()

    body = {"model": kit.name, "prompt": "a", "response_format": {"type": "json_object"}}
    with kit.serving(Engine()) as server:
        answer = httpx.post(server.url + PLAIN, json=body)
    assert answer.status_code == 400 and kit.is_refusal(answer.content)
    assert answer.json()["error"]["param"] == "response_format"
