"""Whatever is sent, the answer is an error in the OpenAI format, never a 500, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def chat(**changes: Any) -> bytes:
    body = {"model": "someone/tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2} | changes
    return json.dumps({key: value for key, value in body.items() if value is not ...}).encode()


def turn(content: Any, role: Any = "user") -> list[Any]:
    return [{"role": role, "content": content}]


NASTY: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "null": b"null",
    "number": b"1",
    "string": b'"hello"',
    "list": b"[]",
    "empty object": b"{}",
    "cut short": chat()[:-5],
    "two objects": chat() + chat(),
    "single quotes": b"{'model': 'someone/tiny'}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": chat().decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + chat(),
    "NUL bytes": b"\x00" * 100,
    "random bytes": bytes(range(256)),
    "NaN": b'{"model": "someone/tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "NaN where it is ignored": chat()[:-1] + b', "user": NaN}',
    "Infinity": chat()[:-1] + b', "top_p": Infinity}',
    "minus Infinity": chat()[:-1] + b', "top_p": -Infinity}',
    "huge float": chat()[:-1] + b', "temperature": 1e999}',
    "huge integer": chat()[:-1] + b', "max_tokens": 1' + b"0" * 5000 + b"}",
    "integer beyond 64 bits": chat(seed=2**80),
    "negative maximum": chat(max_tokens=-1),
    "maximum as text": chat(max_tokens="5"),
    "maximum as float": chat(max_tokens=5.5),
    "maximum as truth": chat(max_tokens=True),
    "lone surrogate": chat()[:-1] + b', "stop": "\\ud800"}',
    "lone surrogate in a prompt": b'{"model": "someone/tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
    "lone surrogate in the model": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep where it is ignored": chat()[:-1] + b', "metadata": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "no model": chat(model=...),
    "model null": chat(model=None),
    "model a number": chat(model=5),
    "model a list": chat(model=["someone/tiny"]),
    "no messages": chat(messages=...),
    "messages null": chat(messages=None),
    "messages empty": chat(messages=[]),
    "messages a string": chat(messages="Hi"),
    "messages an object": chat(messages={"role": "user", "content": "Hi"}),
    "messages of null": chat(messages=[None]),
    "messages of lists": chat(messages=[[[[]]]]),
    "too many messages": chat(messages=turn("a") * 5000),
    "no role": chat(messages=[{"content": "a"}]),
    "unknown role": chat(messages=turn("a", "wizard")),
    "function role": chat(messages=turn("a", "function")),
    "no content": chat(messages=[{"role": "user"}]),
    "tool without content": chat(messages=[{"role": "tool", "tool_call_id": "1"}]),
    "tool calls of a user": chat(
        messages=[{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]
    ),
    "tool calls without arguments": chat(
        messages=[{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    ),
    "arguments an object": chat(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    ),
    "role a list": chat(messages=turn("a", ["user"])),
    "content null": chat(messages=turn(None)),
    "content a number": chat(messages=turn(7)),
    "content an object": chat(messages=turn({"text": "a"})),
    "content empty list": chat(messages=turn([])),
    "content of strings": chat(messages=turn(["a"])),
    "content part without text": chat(messages=turn([{"type": "text"}])),
    "content part of null": chat(messages=turn([None])),
    "audio": chat(messages=turn([{"type": "input_audio", "input_audio": {}}])),
    "tool calls": chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]),
    "stop of numbers": chat(stop=[1]),
    "stop too long": chat(stop="x" * 5000),
    "stream as text": chat(stream="yes"),
    "stream options alone": chat(stream_options={"include_usage": True}),
    "stream options a list": chat(stream=True, stream_options=[]),
    "penalty as text": chat(presence_penalty="1"),
    "penalty beyond": chat(frequency_penalty=2.0001),
    "bias a list": chat(logit_bias=[1]),
    "bias of a word": chat(logit_bias={"a\nb" * 5000: 1}),
    "bias of a negative id": chat(logit_bias={"-1": 1}),
    "bias of a float id": chat(logit_bias={"1.0": 1}),
    "bias as text": chat(logit_bias={"1": "1"}),
    "bias null": chat(logit_bias={"1": None}),
    "bias beyond the vocabulary": chat(logit_bias={"4000000000": 1}),
    "too many biases": chat(logit_bias={str(number): 1 for number in range(5000)}),
    "n zero": chat(n=0),
    "n as float": chat(n=1.5),
    "longer than the context": chat(messages=turn("Explain. " * 4000)),
    "longer than the context, streamed": chat(messages=turn("Explain. " * 4000), stream=True),
}

NASTY_PROMPTS: dict[str, Any] = {
    "none": ...,
    "null": None,
    "number": 5,
    "object": {},
    "no texts": [],
    "two texts, one empty": ["a", ""],
    "more texts than slots and queue": ["a"] * 100,
    "more texts than any server takes": ["a"] * 5000,
    "mixed": ["a", 1],
    "mixed ids": [1, "a"],
    "negative id": [-1],
    "float id": [1.5],
    "true id": [True],
    "id beyond the vocabulary": [400_000],
    "id beyond 32 bits": [2**40],
    "no ids": [[]],
    "two lists of ids, one empty": [[1], []],
    "two lists of ids, one too long": [[1], [5] * 3000],
    "two lists of ids, one beyond the vocabulary": [[1], [400_000]],
    "ids and a text": [[1], "a"],
    "a text and ids": ["a", [1]],
    "nested": [[[1]]],
    "too many ids": [5] * 3000,
    "empty": "",
}


@pytest.fixture(autouse=True)
def _still_well(served: Any, kit: Any) -> Iterator[None]:
    yield
    kit.wait_until(lambda: served.scheduler.active == served.scheduler.waiting == 0)
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_bodies(web: httpx.Client, kit: Any, name: str) -> None:
    answer = web.post(CHAT, content=NASTY[name], headers=JSON)
    assert answer.status_code == 400, answer.text
    assert kit.is_refusal(answer.content) and len(answer.content) < 1500


@pytest.mark.parametrize("name", NASTY_PROMPTS)
def test_nasty_prompts(web: httpx.Client, kit: Any, name: str) -> None:
    body = {"model": kit.name, "max_tokens": 2}
    if NASTY_PROMPTS[name] is not ...:
        body["prompt"] = NASTY_PROMPTS[name]
    answer = web.post(PLAIN, json=body)
    assert answer.status_code == 400 and kit.is_refusal(answer.content), answer.text
    assert answer.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "\ufffe",
        "e\u0301" * 50,
        "\u202e",
        "\U0001f469\u200d\U0001f467" * 20,
        "\r\n\r\n",
        "data: [DONE]\n\n",
        "</s><s>",
    ],
)
def test_odd_text_is_only_text(web: httpx.Client, kit: Any, text: str) -> None:
    for stream in (False, True):
        answer = web.post(CHAT, content=chat(messages=turn(text), stream=stream), headers=JSON)
        assert answer.status_code == 200, answer.text


def test_unknown_fields_are_ignored(web: httpx.Client) -> None:
    extra = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "x": [{"y": 1}], "n": 1}
    nothing = {"tools": [], "stop": None, "logit_bias": {}, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert web.post(CHAT, content=chat(**extra, **nothing), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/embeddings", "/V1/models", "/%2Fv1/models", "/v1/models/../x", "/%00", "/health/"]
)
def test_unknown_paths(web: httpx.Client, kit: Any, path: str) -> None:
    answer = web.get(path)
    assert answer.status_code == 404 and kit.is_refusal(answer.content)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", PLAIN),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PATCH", "/metrics"),
        ("TRACE", CHAT),
    ],
)
def test_wrong_methods(web: httpx.Client, kit: Any, method: str, path: str) -> None:
    answer = web.request(method, path)
    assert answer.status_code == 405 and answer.headers["allow"] and kit.is_refusal(answer.content)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(web: httpx.Client, kit: Any, kind: str) -> None:
    answer = web.post(CHAT, content=chat(), headers={"Content-Type": kind})
    assert answer.status_code == 415 and kit.is_refusal(answer.content)
    assert web.post(CHAT, content=chat(), headers={"Content-Type": "Application/JSON; charset=utf-8"}).is_success


def test_body_limit(web: httpx.Client, kit: Any) -> None:
    large = chat(messages=turn("a" * 1024 * 1024))
    for content in (large, iter([large[:1000], large[1000:]])):  # with a length, and in chunks without one
        answer = web.post(CHAT, content=content, headers=JSON)
        assert answer.status_code == 413 and kit.is_refusal(answer.content)


def test_a_length_that_is_a_lie_is_refused_unread(served: Any, kit: Any) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(served, f"{head}Content-Length: {'9' * 16}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413") and kit.is_refusal(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: nonsense\r\n\r\n",
    ],
)
def test_what_is_not_http(served: Any, kit: Any, data: bytes) -> None:
    answer = raw(served, data)
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 501")
    assert kit.is_refusal(answer.partition(b"\r\n\r\n")[2])


def raw(served: Any, data: bytes) -> bytes:
    """What comes back for these bytes, until a complete answer or the end of the connection."""
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # the server may make up its mind before it has read everything
            connection.sendall(data)
        with contextlib.suppress(OSError):
            while not answer.endswith(b"}}"):
                part = connection.recv(65536)
                if not part:
                    break
                answer += part
        return answer


@pytest.mark.parametrize("data", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_does_not_come_ends_the_connection(
    served: Any, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr("gradmap_hub.serving.protocol.HEAD_SECONDS", 0.2)
    started = time.monotonic()
    assert raw(served, data) == b"" and time.monotonic() - started < 5


def test_a_body_that_does_not_come_is_refused(served: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmap_hub.serving.api.BODY_SECONDS", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{{"
    answer = raw(served, head.encode())
    assert answer.startswith(b"HTTP/1.1 408") and kit.is_refusal(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "[", "localhost@evil", ""]
)
def test_rebound_names_are_refused(web: httpx.Client, kit: Any, host: str) -> None:
    answer = web.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 400 and kit.is_refusal(answer.content)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_allowed(web: httpx.Client, host: str) -> None:
    assert web.get("/v1/models", headers={"Host": host}).is_success


def test_no_web_page_may_read_by_default(web: httpx.Client) -> None:
    answer = web.get("/v1/models", headers={"Origin": "https://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = web.options(CHAT, headers={"Origin": "https://page.example", "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405


def test_allowed_origins_and_hosts(model: Any, kit: Any) -> None:
    allowed, other = "https://page.example", "https://other.example"
    with kit.serving(model, allow_origins=(allowed,), allow_hosts=("llm.example",), api_key="k") as server:
        web = httpx.Client(base_url=server.url, headers={"Host": "llm.example"})
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = web.options(CHAT, headers={"Origin": allowed, **asked})
        assert preflight.is_success and preflight.headers["access-control-allow-origin"] == allowed
        assert web.options(CHAT, headers={"Origin": other, **asked}).status_code == 400
        refused = web.get("/v1/models", headers={"Origin": allowed})  # the page can read why
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == allowed


def test_key(model: Any, kit: Any) -> None:
    with kit.serving(model, api_key="s3cret") as server:
        web = httpx.Client(base_url=server.url)
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            for given in ("", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer s\u00e93cret"):
                answer = web.get(path, headers={"Authorization": given.encode("latin-1")} if given else {})
                assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
                assert kit.is_refusal(answer.content) and "s3cret" not in answer.text
        assert web.post(CHAT, content=b"not json").status_code == 401
        assert web.get("/health").is_success and web.get("/ready").is_success
        for scheme in ("Bearer", "bearer"):
            assert web.get("/metrics", headers={"Authorization": f"{scheme} s3cret"}).is_success


def test_metrics(model: Any, kit: Any) -> None:
    with kit.serving(model, slots=3) as server:
        web = httpx.Client(base_url=server.url)
        web.post(CHAT, content=chat(max_tokens=5, temperature=0), headers=JSON)
        web.post(CHAT, content=b"{}", headers=JSON)
        for number in range(50):
            web.get(f"/{number}")
        text = web.get("/metrics").text
        assert f'gradmap_requests_total{{route="{CHAT}",status="200"}} 1.0' in text
        assert f'gradmap_requests_total{{route="{CHAT}",status="400"}} 1.0' in text
        assert 'gradmap_requests_total{route="other",status="404"} 50.0' in text
        assert "gradmap_completion_tokens_total 5.0" in text and "gradmap_slots 3.0" in text
        assert "gradmap_slots_active 0.0" in text and "gradmap_queue_depth 0.0" in text
        assert "gradmap_time_to_first_token_seconds_count 1.0" in text
        assert 'gradmap_generations_total{outcome="length"} 1.0' in text


def test_ready(web: httpx.Client, kit: Any) -> None:
    assert web.get("/ready").json() == {"status": "ready", "model": kit.name, "active": 0, "waiting": 0}
