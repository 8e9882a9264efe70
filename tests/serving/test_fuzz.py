"""Bodies nobody thought of: made by hypothesis from pieces of valid ones, and by schemathesis from /openapi.json."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

hypothesis = pytest.importorskip("hypothesis")
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = 200
COMMON = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
TEXT = st.text(max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**63 - 2, max_value=2**63 + 2)
    | st.floats()  # NaN and infinities are written as Python's json does, which no other parser takes
    | TEXT
    | st.sampled_from(["user", "assistant", "tool", "text", "image_url", "someone/tiny", "\ud800", "json_object"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "model", ""]) | TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", "stop", "stream", "stream_options", "n", "best_of", "echo", "suffix", "logprobs",
    "top_logprobs", "tools", "tool_choice", "functions", "function_call", "response_format", "logit_bias",
    "presence_penalty", "frequency_penalty", "modalities", "audio", "user", "metadata", "min_tokens",
    "ignore_eos", "continue_final_message", "add_generation_prompt", "add_special_tokens", "tokens",
]  # fmt: skip
ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@st.composite
def bodies(draw: Any) -> bytes:
    """A valid request with some fields replaced, and now and then with its bytes damaged."""
    body: dict[str, Any] = {
        "model": "someone/tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "prompt": "Hi",
        "max_tokens": 2,
    }
    for field in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique=True)):
        if draw(st.integers(0, 9)) == 0:
            body.pop(field, None)
        else:
            body[field] = draw(VALUES)
    data = json.dumps(body).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + draw(st.integers(0, 8)) :]
    return data


@pytest.fixture(scope="module")
def short(model: Any, kit: Any) -> Any:
    """A server whose longest answer is short: a request that happens to be valid must not take long."""
    with kit.serving(model, timeout=20) as server:
        yield server


def check(kit: Any, answer: httpx.Response) -> None:
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500, answer.text
    assert kit.is_refusal(answer.content)


@COMMON
@given(body=bodies(), route=st.sampled_from(ROUTES))
def test_changed_requests(short: Any, kit: Any, body: bytes, route: str) -> None:
    answer = httpx.post(short.url + route, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    check(kit, answer)


@COMMON
@given(
    body=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()), route=st.sampled_from(ROUTES)
)
def test_bodies_that_are_no_request(short: Any, kit: Any, body: bytes, route: str) -> None:
    answer = httpx.post(short.url + route, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code != 200
    check(kit, answer)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_what_the_description_allows_and_what_it_does_not(short: Any, kit: Any, path: str, mode: str) -> None:
    """Requests made from /openapi.json, right and wrong ones: no 5xx, and answers as they are described."""
    described = schemathesis.openapi.from_url(short.url + "/openapi.json")
    # Not `schema.parametrize()`: schemathesis 4.32 does not go with pytest 9.
    cases = described[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    statuses: set[int] = set()

    @COMMON
    @given(case=cases)
    def one(case: Any) -> None:
        if isinstance(case.body, dict) and mode == "positive":  # a long answer tells no more than a short one
            case.body["max_tokens"] = 4
            case.body.pop("max_completion_tokens", None)
        answer = case.call(timeout=60)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert kit.is_refusal(answer.content)
        case.validate_response(
            answer,
            checks=[
                schemathesis.checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    one()
    assert (200 if mode == "positive" else 400) in statuses
