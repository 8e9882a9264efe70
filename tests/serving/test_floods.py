"""Clients that send what costs the server more than them: it goes on answering others, and ends when it is told to."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradmap_hub.serving import protocol, schemas, server
from gradmap_hub.serving.preparing import Preparer
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.prompts import check_length
from gradmap_hub.serving.settings import CHARACTERS_PER_TOKEN, MAX_PROMPT_IDS, MAX_VALUES, Settings

resource: Any = pytest.importorskip("resource", reason="limits of POSIX")

PLAIN = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
HEAD = f"POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


FLOOD = """
import socket, sys, threading
port, count = int(sys.argv[1]), int(sys.argv[2])
request = sys.stdin.buffer.read()
def again():
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(request)
                while connection.recv(65536):
                    pass
        except OSError:
            continue
for _ in range(count):
    threading.Thread(target=again).start()
"""


@contextmanager
def flood(url: str, body: bytes, clients: int) -> Iterator[None]:
    """A process whose clients send the same request over and over; in this one they would slow down what measures."""
    head = f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    command = [sys.executable, "-c", FLOOD, url.rpartition(":")[2], str(clients)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(head.encode() + body)
        process.stdin.close()
        try:
            yield
        finally:
            process.kill()


def connect(url: str, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    connection.sendall(data)
    return connection


# -- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (PLAIN, {"prompt": "a" * 1_000_000}),
        (PLAIN, {"prompt": ["words and more words " * 40_000]}),
        (PLAIN, {"prompt": [5] * 15_000}),
        (PLAIN, {"prompt": [[5] * 1024]}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 900_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 100}] * 900}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 400}] * 1000}),
    ],
)
def test_what_cannot_fit_is_never_tokenised(
    served: Any, kit: Any, route: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it was given to the tokeniser")

    monkeypatch.setattr(Preparer, "submit", refuse)
    answer = httpx.post(served.url + route, json={"model": kit.name, **body}, timeout=30)
    assert answer.status_code == 400 and kit.is_refusal(answer.content)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_what_may_fit_is_tokenised() -> None:
    asked = schemas.parse(schemas.CompletionRequest, b'{"model": "a", "prompt": "%s"}' % (b"a" * 320), most=10)
    assert check_length(asked, 10) == 10 * CHARACTERS_PER_TOKEN
    with pytest.raises(ApiError, match="320 characters"):
        check_length(asked, 9)
    ids = schemas.parse(schemas.CompletionRequest, b'{"model": "a", "prompt": [1, 2, 3]}', most=10)
    assert check_length(ids, 4) == 3
    with pytest.raises(ApiError, match="3 tokens"):
        check_length(ids, 3)


BASE = b'{"model": "a", "messages": [{"role": "user", "content": "Hi"}]'


@pytest.mark.parametrize(
    "body",
    [
        BASE + b', "x": [' + b"[]," * 300_000 + b"1]}",
        BASE + b', "x": [' + b"{}," * 300_000 + b"1]}",
        BASE + b', "x": {' + b",".join(b'"%d": 1' % number for number in range(80_000)) + b"}}",
        BASE + b', "x": ["\\",' + b'", "' * 250_000 + b'"]}',
        b'{"model": "a", "messages": [' + b"1," * 400_000 + b"1]}",
        json.dumps({"model": "a", "messages": [{"role": "user", "content": [{"type": "x"}] * 15_000}]}).encode(),
        json.dumps({"model": "a", "messages": [{"role": "user", "content": [{"type": "x"}] * 12}] * 1000}).encode(),
        b'{"model": "a", "prompt": [' + b"-1," * 20_000 + b"1]}",
        b"b," * 30_000 + b'"' + b'\\"' * 450_000,  # a text without end, of quotes at which a search could begin
    ],
)
def test_a_body_of_a_megabyte_is_refused_soon(body: bytes) -> None:
    kind = schemas.CompletionRequest if b'"prompt"' in body else schemas.ChatRequest
    began = time.process_time()
    with pytest.raises(ApiError):
        schemas.parse(kind, body, most=21_000)
    assert time.process_time() - began < 0.4  # on the event loop; 0.1 on an idle machine


def test_as_many_values_as_prompts_may_have_are_parsed_soon() -> None:
    body = b'{"model": "a", "prompt": 1, "x": [' + b"{}," * 280_000 + b"1]}"
    began = time.process_time()
    with pytest.raises(ApiError, match="prompt"):
        schemas.parse(schemas.CompletionRequest, body, most=MAX_VALUES + MAX_PROMPT_IDS)
    assert time.process_time() - began < 0.4  # 0.1 on an idle machine


@pytest.mark.parametrize("text", [",,," * 100_000, '\\",' * 100_000, "é,[1,{" * 50_000])
def test_a_text_may_have_any_number_of_commas(text: str) -> None:
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    asked = schemas.parse(schemas.ChatRequest, body.encode(), most=20)
    assert asked.messages[0].text == text


@pytest.mark.long
@pytest.mark.parametrize(
    "prompt", ["words " * 170_000, pytest.param("words " * 5000, marks=pytest.mark.slow)]
)  # beyond the context, and just below
def test_health_answers_while_long_prompts_arrive(tiny_onnx: Path, kit: Any, prompt: str) -> None:
    """The goal is 50 ms at the 99th percentile; the limits allow for the other tests of this run."""
    body = json.dumps({"model": kit.name, "prompt": prompt, "max_tokens": 1}).encode()
    seconds = []
    with (
        kit.command(tiny_onnx, "--threads", "1") as running,
        flood(running.url, body, 20),
        httpx.Client(base_url=running.url, timeout=30) as web,
    ):
        wait = time.monotonic() + 30
        while "context" not in web.post(PLAIN, content=body, headers=JSON).text:
            assert time.monotonic() < wait
        for _ in range(200):
            began = time.perf_counter()
            assert web.get("/health").is_success
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        began = time.perf_counter()
        honest = web.post(PLAIN, json={"model": kit.name, "prompt": "Hi", "max_tokens": 1})
        honest_seconds = time.perf_counter() - began
    seconds.sort()
    print(f"median {seconds[100]:.4f} s, 99% {seconds[197]:.4f} s, worst {seconds[-1]:.4f} s; {honest_seconds:.3f} s")
    assert honest.status_code in (200, 429)
    assert seconds[197] < 0.25 and honest_seconds < 1


# -- the tokeniser's thread ----------------------------------------------------------------------------------------


@pytest.fixture
def preparer() -> Iterator[Preparer]:
    made = Preparer()
    made.start()
    yield made
    made.stop()


def test_the_shortest_prompt_is_first(preparer: Preparer) -> None:
    go, order = threading.Event(), list[int]()
    first = preparer.submit(0, go.wait)
    rest = [preparer.submit(size, lambda size=size: order.append(size)) for size in (500, 3, 90, 3)]
    go.set()
    assert first.result(10)
    for future in rest:
        future.result(10)
    assert order == [3, 3, 90, 500]


def test_what_is_cancelled_is_not_kept(preparer: Preparer) -> None:
    go = threading.Event()
    first = preparer.submit(0, go.wait)
    for _ in range(1000):
        preparer.submit(1, go.wait).cancel()
    assert len(preparer._queue) <= 2  # pyright: ignore[reportPrivateUsage]
    go.set()
    assert first.result(10)
    failed = preparer.submit(1, lambda: 1 // 0)
    assert isinstance(failed.exception(10), ZeroDivisionError)
    assert preparer.submit(1, lambda: 7).result(10) == 7


class Hanging:
    """The real model, whose tokeniser hangs at one word."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.hangs, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        if "hang" in text:
            self.hangs.set()
            self.go.wait(60)
        return self._model.encode(text, special=special)


def test_a_stuck_tokeniser_is_not_ready(model: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmap_hub.serving.preparing.STUCK_SECONDS", 0.2)
    hanging = Hanging(model)
    body = {"model": kit.name, "max_tokens": 1}
    with kit.serving(hanging, timeout=2.0) as running, ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(httpx.post, running.url + PLAIN, json={**body, "prompt": "hang"}, timeout=30)
        kit.wait_until(lambda: httpx.get(running.url + "/ready").status_code == 503)
        assert httpx.get(running.url + "/ready").json()["status"] == "failed"
        assert httpx.get(running.url + "/health").is_success
        assert httpx.post(running.url + PLAIN, json={**body, "prompt": "Hi"}, timeout=30).status_code == 504
        assert stuck.result(30).status_code == 504
        hanging.go.set()
        kit.wait_until(lambda: httpx.get(running.url + "/ready").is_success)
        assert httpx.post(running.url + PLAIN, json={**body, "prompt": "Hi"}, timeout=30).is_success


@pytest.mark.slow
def test_a_stuck_tokeniser_does_not_keep_the_server(model: Any, kit: Any) -> None:
    hanging = Hanging(model)
    with kit.serving(hanging) as running, ThreadPoolExecutor(2) as pool:
        body = {"model": kit.name, "max_tokens": 1}
        stuck = pool.submit(httpx.post, running.url + PLAIN, json={**body, "prompt": "hang"}, timeout=30)
        kit.wait_until(hanging.hangs.is_set)
        behind = pool.submit(httpx.post, running.url + PLAIN, json={**body, "prompt": "Hi"}, timeout=30)
        kit.wait_until(lambda: running.scheduler.waiting == 2)
        began = time.monotonic()
        running.stop()
        assert time.monotonic() - began < 8
        hanging.go.set()
        assert behind.result(10).status_code == 503
        assert stuck.exception(10) is not None or stuck.result().status_code >= 500


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_template_loops(tiny_onnx: Path, kit: Any, tmp_path: Path) -> None:
    folder = tmp_path / "looping"
    folder.mkdir()
    for file in tiny_onnx.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text("{% if 'loop' in messages[0].content %}" + LOOP + "{% endif %}Hi")
    with kit.command(folder, "--threads", "1", "--timeout", "2", "--drain", "1") as running:
        body = {"model": kit.name, "max_tokens": 1, "messages": [{"role": "user", "content": "loop"}]}
        assert httpx.post(running.url + CHAT, json=body, timeout=30).status_code in (400, 504)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(httpx.post, running.url + CHAT, json=body, timeout=30)
            time.sleep(0.5)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0


# -- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /hea", HEAD.encode() + b"Content-Length: 500\r\n\r\n{", HEAD.encode() + b"Content-Length: 500\r\n\r\n"],
)
def test_half_open_connections_do_not_keep_others_out(
    model: Any, kit: Any, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(server, "_most_connections", lambda settings: 20)
    with kit.serving(model) as running, httpx.Client(base_url=running.url, timeout=10) as old:
        assert old.get("/health").is_success
        connections = [connect(running.url, data) for _ in range(120)]
        began = time.monotonic()
        for _ in range(10):
            assert httpx.get(running.url + "/health", timeout=10).is_success
        assert old.get("/health").is_success  # of those that wait, a client that has asked before is the last to go
        assert time.monotonic() - began < 5
        held = running._uvicorn.server_state.connections
        assert len(held) <= 21
        for connection in connections:
            connection.close()


@pytest.mark.slow
def test_a_running_generation_is_not_closed_for_a_new_connection(
    model: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_most_connections", lambda settings: 4)
    body = json.dumps({"model": kit.name, "prompt": "Hi", "max_tokens": 60, "stream": True, "temperature": 0}).encode()
    with kit.serving(model, pace=0.01, slots=4) as running:
        streams = [connect(running.url, HEAD.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                   for _ in range(4)]  # fmt: skip
        kit.wait_until(lambda: running.scheduler.active == 4)
        with pytest.raises((httpx.HTTPError, OSError)):
            httpx.get(running.url + "/health", timeout=10)
        for stream in streams:
            received = b""
            while b"[DONE]" not in received:
                part = stream.recv(65536)
                assert part
                received += part
            stream.close()
        assert httpx.get(running.url + "/health", timeout=10).is_success


@pytest.mark.parametrize(
    ("files", "settings", "most"),
    [(1024, {}, 512), (256, {}, 128), (10**6, {}, 512), (resource.RLIM_INFINITY, {}, 512),
     (10**6, {"queue": 1000}, 4032), (1024, {"queue": 1000}, 512), (1, {}, 1)],
)  # fmt: skip
def test_connections_stay_below_the_limit_of_files(
    monkeypatch: pytest.MonkeyPatch, files: int, settings: dict[str, Any], most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))
    assert server._most_connections(Settings(**settings)) == most  # pyright: ignore[reportPrivateUsage]


@pytest.mark.slow
def test_1100_half_open_connections_at_1024_files(tiny_onnx: Path, kit: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with kit.command(tiny_onnx, "--threads", "1") as running:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
            connections = [connect(running.url) for _ in range(1100)]
            began = time.monotonic()
            for _ in range(20):
                assert httpx.get(running.url + "/health", timeout=10).is_success
            assert time.monotonic() - began < 5
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
            assert len(running.process.stderr.read()) < 20_000
            for connection in connections:
                connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_asyncio_cannot_fill_the_log() -> None:
    sparse = server._Sparse()  # pyright: ignore[reportPrivateUsage]
    record = logging.makeLogRecord({"created": 60.0})
    assert sum(sparse.filter(record) for _ in range(1000)) == 10
    assert sparse.filter(logging.makeLogRecord({"created": 121.0}))
    assert protocol.MAX_CONNECTIONS == 512
