"""Several choices in one request: of one prompt (n), and of several prompts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gradmap_hub.runtime import Sampling
from gradmap_hub.serving import schemas
from gradmap_hub.serving.prompts import check_choices, check_length
from gradmap_hub.serving.scheduler import Busy, Scheduler
from gradmap_hub.serving.settings import MAX_PROMPT_IDS, MAX_VALUES

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TURNS = [{"role": "user", "content": "Explain gravity."}]
PROMPTS = ["The capital of France", "Gravity pulls", "A paper clip opens a page"]


@pytest.fixture(scope="module", params=["model", "batching"])
def engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def web(engine: Any, kit: Any) -> Iterator[httpx.Client]:
    with kit.serving(engine, slots=4) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        kit.wait_until(lambda: server.scheduler.active == server.scheduler.waiting == 0)


def texts(web: httpx.Client, kit: Any, route: str, stream: bool, **body: Any) -> tuple[list[str], Any]:
    """The text of each choice and the usage; every choice ends once, and begins with its role in a chat."""
    chat = route == CHAT
    if not stream:
        answer = kit.asked(web, route, **body)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        said = [choice["message"]["content"] if chat else choice["text"] for choice in answer["choices"]]
        return said, answer["usage"]
    body = {"model": kit.name, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    with web.stream("POST", route, json=body) as answer:
        assert answer.status_code == 200
        *chunks, last, done = kit.events(answer.iter_lines())
    assert done == "[DONE]" and last["choices"] == [] and len({chunk["id"] for chunk in chunks}) == 1
    found: dict[int, str] = {}
    roles, ended = [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert index not in ended
        if choice["finish_reason"]:
            ended.append(index)
        if chat and "role" in choice["delta"]:
            roles.append(index)
        found[index] = found.get(index, "") + ((choice["delta"].get("content") or "") if chat else choice["text"])
    assert sorted(ended) == sorted(found) and (not chat or sorted(roles) == sorted(found))
    return [found[index] for index in sorted(found)], last["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_greedy_choices_are_those_of_a_lone_request(
    web: httpx.Client, engine: Any, kit: Any, route: str, stream: bool
) -> None:
    given = {"messages": TURNS} if route == CHAT else {"prompt": PROMPTS[0]}
    ids = engine.encode_chat(TURNS) if route == CHAT else engine.encode(PROMPTS[0])
    said, usage = texts(web, kit, route, stream, max_tokens=20, n=6, **given)  # more than slots
    assert said == [kit.alone(engine, ids, 20)] * 6
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 120)


@pytest.mark.parametrize("stream", [False, True])
def test_a_seed_gives_each_choice_its_own(web: httpx.Client, engine: Any, kit: Any, stream: bool) -> None:
    body = {"messages": TURNS, "max_tokens": 20, "temperature": 1.5}
    said, _ = texts(web, kit, CHAT, stream, n=3, seed=11, **body)
    ids = engine.encode_chat(TURNS)
    wanted = ["".join(engine.start(ids, max_tokens=20, sampling=Sampling(1.5, seed=seed))) for seed in (11, 12, 13)]
    assert said == wanted and len(set(said)) == 3
    alone, _ = texts(web, kit, CHAT, stream, seed=11, **body)
    assert alone == wanted[:1]
    unseeded, _ = texts(web, kit, CHAT, stream, n=3, **body)
    assert len(set(unseeded)) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["texts", "ids"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_list_of_prompts(web: httpx.Client, engine: Any, kit: Any, given: str, n: int, stream: bool) -> None:
    ids = [engine.encode(prompt) for prompt in PROMPTS]
    prompt = PROMPTS if given == "texts" else ids
    said, usage = texts(web, kit, PLAIN, stream, prompt=prompt, max_tokens=12, n=n, best_of=n)
    assert said == [kit.alone(engine, each, 12) for each in ids for _ in range(n)]
    assert usage["prompt_tokens"] == sum(map(len, ids)) and usage["completion_tokens"] == 12 * n * len(ids)


def test_every_choice_has_its_own_echo_and_logprobs(web: httpx.Client, engine: Any, kit: Any) -> None:
    answer = kit.asked(web, PLAIN, prompt=PROMPTS, max_tokens=4, echo=True, logprobs=1)
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        (alone,) = kit.asked(web, PLAIN, prompt=prompt, max_tokens=4, echo=True, logprobs=1)["choices"]
        assert choice["text"].startswith(prompt) and choice | {"index": 0, "logprobs": 0} == alone | {"logprobs": 0}
        for name in ("tokens", "text_offset"):
            assert choice["logprobs"][name] == alone["logprobs"][name]
        found, wanted = (each["logprobs"]["token_logprobs"][1:] for each in (choice, alone))
        assert found == pytest.approx(wanted, abs=1e-4)


def test_what_is_refused_is_named(web: httpx.Client, kit: Any) -> None:
    for body, param in (
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"n": 69}, "n"),  # slots and queue hold 68
        ({"prompt": ["a"] * 35, "n": 2}, "n"),
        ({"prompt": ["a"] * 69}, "prompt"),
        ({"n": 1.0}, "n"),
        ({"n": True}, "n"),
    ):
        answer = web.post(PLAIN, json={"model": kit.name, "prompt": "a", "max_tokens": 1, **body})
        assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
        assert answer.json()["error"]["param"] == param


def test_a_batch_of_long_prompts_is_parsed_soon() -> None:
    """64 prompts of 2,048 token ids each, as a harness posts them; on the event loop."""
    body = json.dumps({"model": "a", "prompt": [[50_000] * 2048] * 64}).encode()
    began = time.process_time()
    asked = schemas.parse(schemas.CompletionRequest, body, most=MAX_VALUES + MAX_PROMPT_IDS)
    assert check_length(asked, 4096) == 64 * 2048 and check_choices(asked, 72) == 64
    assert time.process_time() - began < 0.15


def test_who_goes_frees_every_place(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.02, slots=2, queue=4) as server:
        body = {"model": kit.name, "prompt": PROMPTS * 2, "max_tokens": 500, "temperature": 0, "stream": True}
        with httpx.Client(base_url=server.url, timeout=60) as web:
            with web.stream("POST", PLAIN, json=body) as answer:
                lines = answer.iter_lines()  # kept: its end closes the connection
                next(lines)
                assert server.scheduler.active == 2 and server.scheduler.full
                assert web.post(PLAIN, json=body).status_code == 429
            kit.wait_until(lambda: server.scheduler.active == server.scheduler.waiting == 0)
            assert 'gradmap_generations_total{outcome="cancelled"} 6.0' in web.get("/metrics").text


def test_all_places_or_none(model: Any) -> None:
    scheduler = Scheduler(model, slots=2, queue=2)
    assert scheduler.capacity == 4
    wake = threading.Event().set
    two = scheduler.admit_all(wake, 2)
    with pytest.raises(Busy):
        scheduler.admit_all(wake, 3)
    assert scheduler.waiting == 2
    assert len(scheduler.admit_all(wake, 2)) == 2 and scheduler.full
    for job in two:
        job.cancel()
    assert scheduler.waiting == 2
