"""Log-probabilities of answers and prompts: those that the engine computes over the whole text at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from gradmap_hub.runtime import Sampling, generation
from gradmap_hub.runtime.scores import LEAST, score

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TURNS = [{"role": "user", "content": "Explain gravity, schön 🦊."}]
PROMPT = "The capital of France is schön 🦊"


def streamed(web: httpx.Client, kit: Any, route: str, **body: Any) -> list[Any]:
    with web.stream("POST", route, json={"model": kit.name, "temperature": 0, "stream": True, **body}) as answer:
        assert answer.status_code == 200
        *chunks, done = kit.events(answer.iter_lines())
    assert done == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks]


def ran(model: Any, ids: Sequence[int], count: int, **options: Any) -> Any:
    answer = model.start(ids, max_tokens=count, **options)
    list(answer)
    return answer


def plain(model: Any) -> dict[int, float]:
    """A bias that forbids special tokens and parts of characters: the tiny model knows nothing of UTF-8."""
    shown = (token for token in range(model.vocabulary) if not model.is_special(token))
    allowed = {token for token in shown if all(32 <= byte < 127 for byte in model.token_bytes(token))}
    return {token: -100.0 for token in range(model.vocabulary) if token not in allowed}


def direct(model: Any, ids: Sequence[int]) -> list[float]:
    """The log-probability of every token but the first."""
    return (-model.losses(ids)).tolist()


# -- the computation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("top", [0, 1, 3, 50])
def test_scores_are_the_softmax(dtype: type, top: int) -> None:
    logits = np.random.default_rng(0).normal(0, 5, 40).astype(dtype)
    wanted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    found = score(logits, 7, top)
    assert found.token == 7 and found.logprob == pytest.approx(wanted[7])
    order = np.argsort(-wanted, kind="stable")[:top]
    assert [token for token, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(wanted[order].tolist())


def test_ties_are_listed_by_id_and_begin_with_the_greedy_token() -> None:
    logits = np.array([1, 3, 3, 0, 3], dtype=np.float32)
    assert [token for token, _ in score(logits, 0, 2).top] == [1, 2]
    assert score(logits, 0, 1).top[0][0] == logits.argmax()


@pytest.mark.parametrize("strange", [-np.inf, np.nan])
def test_what_json_cannot_write_becomes_the_least(strange: float) -> None:
    found = score(np.array([1.0, strange, 2.0], dtype=np.float32), 1, 3)
    assert found.logprob == LEAST and all(math.isfinite(value) for _, value in found.top)


# -- chat ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_chat(web: httpx.Client, model: Any, kit: Any, stream: bool) -> None:
    bias = plain(model)
    body = {"messages": TURNS, "max_tokens": 40, "logprobs": True, "top_logprobs": 3, "logit_bias": bias}
    if stream:
        choices = streamed(web, kit, CHAT, **body)
        content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        for choice in choices:  # of the text of the same event
            entries = choice["logprobs"]["content"] if choice["logprobs"] else []
            assert "".join(entry["token"] for entry in entries) == (choice["delta"].get("content") or "")
    else:
        (choice,) = kit.asked(web, CHAT, **body)["choices"]
        content, text = choice["logprobs"]["content"], choice["message"]["content"]
        assert choice["logprobs"]["refusal"] is None
    ids = model.encode_chat(TURNS)
    alone = ran(model, ids, 40, sampling=Sampling(logit_bias=bias))
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text == alone.text
    wanted = direct(model, [*ids, *alone.token_ids])[len(ids) - 1 :]
    assert [entry["logprob"] for entry in content] == pytest.approx(wanted, abs=1e-4)
    for entry in content:
        top = [each["logprob"] for each in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)

    (choice,) = kit.asked(web, CHAT, messages=TURNS, max_tokens=9, logprobs=True, top_logprobs=1)["choices"]
    for entry in choice["logprobs"]["content"]:  # greedy
        assert entry["top_logprobs"] == [{name: entry[name] for name in ("token", "logprob", "bytes")}]


def test_they_are_the_models_before_temperature_penalties_and_biases(web: httpx.Client, model: Any, kit: Any) -> None:
    options = {"temperature": 1.7, "top_p": 0.8, "presence_penalty": 2, "logit_bias": {"9": 4}, "seed": 5}
    (choice,) = kit.asked(web, CHAT, messages=TURNS, max_tokens=24, logprobs=True, **options)["choices"]
    ids = model.encode_chat(TURNS)
    sampling = Sampling(1.7, top_p=0.8, seed=5, presence_penalty=2.0, logit_bias={9: 4.0})
    output = ran(model, ids, 24, sampling=sampling).token_ids
    found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert found == pytest.approx(direct(model, [*ids, *output])[len(ids) - 1 :], abs=1e-4)
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])


def test_without_logprobs_there_are_none(web: httpx.Client, kit: Any) -> None:
    for options in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}):
        (choice,) = kit.asked(web, CHAT, messages=TURNS, max_tokens=2, **options)["choices"]
        assert choice["logprobs"] is None


# -- completions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "batching"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["text", "ids"])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_echo(
    which: str, stream: bool, given: str, count: int, request: pytest.FixtureRequest, kit: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)  # the prompt is read in parts
    model = request.getfixturevalue(which)
    ids = model.encode(PROMPT)
    bias = plain(model)
    body = {"prompt": PROMPT if given == "text" else ids, "max_tokens": count, "logit_bias": bias}
    body |= {"echo": True, "logprobs": 2}
    with kit.serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        choices = streamed(web, kit, PLAIN, **body) if stream else kit.asked(web, PLAIN, **body)["choices"]
    text = "".join(choice["text"] for choice in choices)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for name in found:
            found[name] += (choice["logprobs"] or found | {name: []})[name]
    alone = ran(model, ids, count, sampling=Sampling(logit_bias=bias))
    everything = [*ids, *alone.token_ids]
    assert text == PROMPT + alone.text and choices[-1]["finish_reason"] == "length"
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(direct(model, everything), abs=1e-4)
    assert {len(values) for values in found.values()} == {len(everything)}
    for token, value, top, offset in list(zip(*found.values(), strict=True))[1:]:
        assert top[token] == value and 2 <= len(top) <= 3
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token)


def test_echo_without_logprobs(web: httpx.Client, model: Any, kit: Any) -> None:
    (choice,) = kit.asked(web, PLAIN, prompt=PROMPT, max_tokens=5, echo=True)["choices"]
    assert choice["text"] == PROMPT + kit.alone(model, model.encode(PROMPT), 5) and choice["logprobs"] is None
    nothing = kit.asked(web, PLAIN, prompt=PROMPT, max_tokens=0, echo=True)
    assert nothing["choices"][0]["text"] == PROMPT and nothing["usage"]["completion_tokens"] == 0


def test_logprobs_0_are_those_of_the_chosen_tokens(web: httpx.Client, model: Any, kit: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "logprobs": 0, "logit_bias": plain(model)}
    (choice,) = kit.asked(web, PLAIN, **body)["choices"]
    found = choice["logprobs"]
    assert [list(top.values()) for top in found["top_logprobs"]] == [[value] for value in found["token_logprobs"]]
    assert found["text_offset"][0] == 0 and "".join(found["tokens"]) == choice["text"]


def test_a_prompt_may_fill_the_context_if_nothing_follows(web: httpx.Client, kit: Any) -> None:
    body = {"prompt": [5] * kit.context, "echo": True, "logprobs": 1}
    (choice,) = kit.asked(web, PLAIN, max_tokens=0, **body)["choices"]
    assert len(choice["logprobs"]["tokens"]) == kit.context
    refused = web.post(PLAIN, json={"model": kit.name, "max_tokens": 1, **body})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    beyond = web.post(PLAIN, json={"model": kit.name, "max_tokens": 0, **body, "prompt": [5] * (kit.context + 1)})
    assert beyond.status_code == 400 and beyond.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_has_no_log_probabilities(web: httpx.Client, model: Any, kit: Any, stream: bool) -> None:
    bias = plain(model)
    whole = ran(model, model.encode(PROMPT), 40, sampling=Sampling(logit_bias=bias))
    pieces = [model.token_bytes(token).decode() for token in whole.token_ids]
    stop = "".join(pieces[20:23])
    body = {"prompt": PROMPT, "max_tokens": 40, "logprobs": 1, "logit_bias": bias, "stop": stop}
    choices = streamed(web, kit, PLAIN, **body) if stream else kit.asked(web, PLAIN, **body)["choices"]
    text = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert choices[-1]["finish_reason"] == "stop" and text == whole.text[: whole.text.index(stop)]
    assert tokens == pieces[: len(tokens)] and "".join(tokens) == text and len(tokens) <= 20


def test_an_end_token_has_one(web: httpx.Client, model: Any, kit: Any) -> None:
    """lm-evaluation-harness asks for one token and leaves the last log-probability out: there must always be one."""
    end = min(model.end_ids)
    body = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "echo": True, "logit_bias": {str(end): 100}}
    (choice,) = kit.asked(web, PLAIN, **body)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(model.encode(PROMPT)) + 1


@pytest.mark.parametrize("which", ["model", "batching"])
def test_answers_are_the_same_beside_requests_that_are_scored(
    which: str, request: pytest.FixtureRequest, kit: Any
) -> None:
    model = request.getfixturevalue(which)
    features: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"logprobs": 0, "echo": True}, {"echo": True}]
    prompts = [f"{PROMPT} {number}" for number in range(4)]
    cases = [(prompt, options) for prompt in prompts for options in features]
    with (
        kit.serving(model) as server,
        httpx.Client(base_url=server.url, timeout=60) as web,
        ThreadPoolExecutor(len(cases)) as pool,
    ):
        answers = list(pool.map(lambda case: kit.asked(web, PLAIN, prompt=case[0], max_tokens=48, **case[1]), cases))
    for (prompt, options), answer in zip(cases, answers, strict=True):
        echo = prompt if "echo" in options else ""
        assert answer["choices"][0]["text"] == echo + kit.alone(model, model.encode(prompt), 48)


def test_what_is_refused_is_named(web: httpx.Client, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(route: str, **body: Any) -> Any:
        answer = web.post(route, json={"model": kit.name, "max_tokens": 1, **body})
        assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
        return answer.json()["error"]["param"]

    for wrong in (1, "true", 0):
        assert refusal(CHAT, messages=TURNS, logprobs=wrong) == "logprobs"
    assert refusal(CHAT, messages=TURNS, logprobs=True, top_logprobs=21) == "top_logprobs"
    assert refusal(CHAT, messages=TURNS, top_logprobs=2) == "top_logprobs"
    for wrong in (True, -1, 21, 1.5, "1"):
        assert refusal(PLAIN, prompt=PROMPT, logprobs=wrong) == "logprobs"
    assert refusal(PLAIN, prompt=PROMPT, echo=1) == "echo"
    assert refusal(PLAIN, prompt=PROMPT, max_tokens=0) == "max_tokens"
    assert refusal(CHAT, messages=TURNS, max_tokens=0) == "max_tokens"
    monkeypatch.setattr("gradmap_hub.serving.prompts.MAX_SCORES", 22)
    body = {"prompt": [5] * 10, "logprobs": 1, "echo": True}
    assert refusal(PLAIN, **body, max_tokens=2) == refusal(PLAIN, **body, n=2) == "logprobs"
    assert refusal(CHAT, messages=TURNS, logprobs=True, max_tokens=23) == "top_logprobs"
    kit.asked(web, PLAIN, **body, max_tokens=1)
    kit.asked(web, CHAT, messages=TURNS, logprobs=True, max_tokens=22)


# -- lm-evaluation-harness -----------------------------------------------------------------------------------------


def test_lm_eval_chooses_what_the_engine_chooses(web: httpx.Client, model: Any, kit: Any) -> None:
    """Its local-completions model posts context and continuation as token ids, and reads the sums from the answer."""
    completions = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    documents = [
        ("The capital of France is", [" Paris", " a paper clip", " Gravity"]),
        ("An apple falls because of", [" Gravity", " the Seine", " Paris"]),
        ("Question: What opens a page?\nAnswer:", [" a paper clip", " an apple", " the Seine"]),
    ]
    client = SimpleNamespace(model=kit.name)
    for context, continuations in documents:
        before, after = model.encode(context), [model.encode(text) for text in continuations]
        direct_sums = [sum(direct(model, before + each)[len(before) - 1 :]) for each in after]
        served_sums: list[float] = []
        for batch in range(1, len(after) + 1):  # batch_size; it posts lists of lists, of one prompt too
            served_sums = []
            for start in range(0, len(after), batch):
                prompts = [before + each for each in after[start : start + batch]]
                answer = web.post(PLAIN, json=completions._create_payload(client, prompts))
                assert answer.status_code == 200, answer.text
                found = completions.parse_logprobs(answer.json(), ctxlens=[len(before)] * len(prompts))
                served_sums += [total for total, _ in found]
                for each, (_, greedy) in zip(after[start:], found, strict=False):
                    assert greedy == (ran(model, before, len(each)).token_ids == each)
            assert served_sums == pytest.approx(direct_sums, abs=1e-3)
        assert served_sums == pytest.approx(direct_sums, abs=1e-3)
        assert int(np.argmax(served_sums)) == int(np.argmax(direct_sums))
    # A continuation that the model would choose is greedy.
    before = model.encode(PROMPT)
    after = ran(model, before, 5).token_ids
    answer = web.post(PLAIN, json=completions._create_payload(client, before + after)).json()
    assert completions.parse_logprobs(answer, ctxlens=[len(before)])[0][1] is True


def test_lm_eval_gets_the_text_before_its_stop_strings(web: httpx.Client, model: Any, kit: Any) -> None:
    """Those of humaneval, the end token's text among them; one of them is in the answer."""
    completions = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    prompts = [model.encode(text) for text in ("The capital of France", "Gravity pulls")]
    whole = [kit.alone(model, ids, 30) for ids in prompts]
    until = [whole[0][10:13], "\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    client = SimpleNamespace(model=kit.name, _max_gen_toks=256)
    options = {"until": until, "max_gen_toks": 30, "do_sample": False}
    payload = completions._create_payload(client, prompts, generate=True, gen_kwargs=options, eos="</s>")
    answer = web.post(PLAIN, json=payload)
    assert answer.status_code == 200, answer.text
    found = completions.parse_generations(answer.json())
    assert found == [min((text.split(stop)[0] for stop in until), key=len) for text in whole]
    assert found[0] != whole[0]
