"""The real `openai` client against the real thing."""

from __future__ import annotations

from typing import Any

import pytest

from gradmap_hub.runtime import Sampling

openai = pytest.importorskip("openai")

TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Explain gravity."}]
PROMPT = "The capital of France"


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0, timeout=60)


def test_models(client: Any, kit: Any) -> None:
    (listed,) = client.models.list().data
    assert listed.id == kit.name and listed.owned_by == "someone"
    assert client.models.retrieve(kit.name).id == kit.name
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("someone/else")
    assert refused.value.code == "model_not_found"


def test_chat(client: Any, model: Any, kit: Any) -> None:
    answer = client.chat.completions.create(model=kit.name, messages=TURNS, max_tokens=24, temperature=0)
    ids = model.encode_chat(TURNS)
    (choice,) = answer.choices
    assert choice.message.content == kit.alone(model, ids, 24)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(ids), 24, len(ids) + 24)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == kit.name


def test_chat_in_parts_and_as_developer(client: Any, model: Any, kit: Any) -> None:
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Explain "}, {"type": "text", "text": "gravity."}]},
    ]
    answer = client.chat.completions.create(
        model=kit.name, messages=turns, max_completion_tokens=8, max_tokens=20, temperature=0, user="u", store=False
    )
    assert answer.choices[0].message.content == kit.alone(model, model.encode_chat(TURNS), 8)


def test_streamed_chat(client: Any, model: Any, kit: Any) -> None:
    stream = client.chat.completions.create(
        model=kit.name,
        messages=TURNS,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and not deltas[0].content
    assert all(delta.role is None for delta in deltas[1:])
    assert deltas[-1].content is None
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    text = "".join(delta.content or "" for delta in deltas)
    assert text == kit.alone(model, model.encode_chat(TURNS), 24)


def test_a_stream_comes_in_pieces(client: Any, kit: Any) -> None:
    """As it is written, not all at the end. A piece holds what was written since the last one was sent, and the tiny
    model writes hundreds of tokens in a moment; so one answer of several in pieces says it."""

    def pieces() -> int:
        stream = client.chat.completions.create(
            model=kit.name, messages=TURNS, max_tokens=400, temperature=0, stream=True
        )
        return sum(bool(chunk.choices[0].delta.content) for chunk in stream)

    assert any(pieces() > 1 for _ in range(10))


def test_completion(client: Any, model: Any, kit: Any) -> None:
    ids = model.encode(PROMPT)
    for prompt in (PROMPT, [PROMPT], ids, [ids]):
        answer = client.completions.create(model=kit.name, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == kit.alone(model, ids, 12)
        assert answer.choices[0].finish_reason == "length" and answer.usage.prompt_tokens == len(ids)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    short = client.completions.create(model=kit.name, prompt=PROMPT, temperature=0)
    assert short.usage.completion_tokens == 16


def test_streamed_completion(client: Any, model: Any, kit: Any) -> None:
    stream = client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == kit.alone(model, model.encode(PROMPT), 12)
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage is None


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: Any, model: Any, kit: Any, stream: bool) -> None:
    whole = kit.alone(model, model.encode(PROMPT), 40)
    stop = next(whole[at : at + 4] for at in range(10, len(whole)) if "\ufffd" not in whole[at : at + 4])
    answer = client.completions.create(
        model=kit.name, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never said"], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_seed(client: Any, kit: Any) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=kit.name, prompt=PROMPT, max_tokens=16, temperature=1.5, top_p=0.9, seed=seed,
            extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
        )  # fmt: skip
        return answer.choices[0].text

    assert ask(-1) == ask(-1)
    assert len({ask(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("chat", [True, False])
def test_penalties_and_biases_reach_the_sampler(client: Any, model: Any, kit: Any, chat: bool) -> None:
    """Greedy answers are those of the engine with the same sampling, and others than without."""
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"7": 3.5, "5": -100}}
    ids = model.encode_chat(TURNS) if chat else model.encode(PROMPT)
    common = {"model": kit.name, "max_tokens": 40, "temperature": 0, **options}
    if chat:
        said = client.chat.completions.create(messages=TURNS, **common).choices[0].message.content
    else:
        said = client.completions.create(prompt=PROMPT, **common).choices[0].text
    sampling = Sampling(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={7: 3.5, 5: -100.0})
    assert said == "".join(model.start(ids, max_tokens=40, sampling=sampling)) != kit.alone(model, ids, 40)


def test_a_bias_of_100_decides_and_of_minus_100_forbids(client: Any, model: Any, kit: Any) -> None:
    def ask(bias: dict[str, float]) -> str:
        answer = client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=6, temperature=0, logit_bias=bias)
        return answer.choices[0].text

    generation = model.start(model.encode(PROMPT), max_tokens=6)
    list(generation)
    first = generation.token_ids[0]
    again = model.start(model.encode(PROMPT), max_tokens=6, sampling=Sampling(logit_bias={first: 100.0}))
    list(again)
    assert again.token_ids == [first] * 6 and ask({str(first): 100}) == again.text
    assert ask({str(first): -100}) != generation.text


def test_top_p_zero_is_greedy(client: Any, model: Any, kit: Any) -> None:
    answer = client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=8, top_p=0)
    assert answer.choices[0].text == kit.alone(model, model.encode(PROMPT), 8)


def test_the_context_bounds_the_answer(client: Any, model: Any, kit: Any) -> None:
    ids = (model.encode(PROMPT) * kit.context)[: kit.context - 3]
    answer = client.completions.create(model=kit.name, prompt=ids, max_tokens=50, temperature=0)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=kit.name, prompt=[*ids, 5, 5, 5], temperature=0)
    assert refused.value.code == "context_length_exceeded" and str(kit.context) in refused.value.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 100}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"400000": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": [f"{number}" for number in range(17)]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"modalities": ["audio"]}, "modalities[0]"),
    ],
)
def test_what_is_refused_is_named(client: Any, kit: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=kit.name, messages=TURNS, **options)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_images_are_refused_by_name(client: Any, kit: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=kit.name, messages=turns)
    assert refused.value.param == "messages[0].content[1].type" and "text" in refused.value.message


def test_another_model_is_not_here_if_names_are_strict(model: Any, kit: Any) -> None:
    with kit.serving(model, strict_model=True) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=60)
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model="gpt-4o", messages=TURNS)
        assert refused.value.code == "model_not_found" and refused.value.param == "model"
        assert client.chat.completions.create(model=kit.name, messages=TURNS, max_tokens=1).choices


def test_key(model: Any, kit: Any) -> None:
    with kit.serving(model, api_key="a-secret") as server:
        base = server.url + "/v1"
        with pytest.raises(openai.AuthenticationError) as refused:
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
        assert refused.value.code == "invalid_api_key" and "wrong" not in refused.value.message
        assert openai.OpenAI(base_url=base, api_key="a-secret", max_retries=0).models.list().data


def test_overload_raises_the_clients_own_error(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.02, slots=1, queue=0) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        running = client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=500, temperature=0, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=kit.name, prompt=PROMPT)
        assert refused.value.code == "queue_full" and int(refused.value.response.headers["retry-after"]) >= 1
        running.close()  # frees the slot
        kit.wait_until(lambda: server.scheduler.active == 0)
        assert client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=2).choices


def test_a_stream_that_takes_too_long_ends_with_an_error(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.05, timeout=0.6) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=500, temperature=0, stream=True)
        received = []
        with pytest.raises(openai.APIError) as failed:
            received.extend(stream)
        assert failed.value.code == "request_timeout"
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model=kit.name, prompt=PROMPT, max_tokens=500, temperature=0)
        assert refused.value.status_code == 504 and refused.value.code == "request_timeout"
        kit.wait_until(lambda: server.scheduler.active == 0)
