"""Many clients at once: the same tokens as alone, quick refusals, and no slot lost to those who go away."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gradmap_hub.runtime.pool import RowPool

pytestmark = pytest.mark.long  # many clients at once

PLAIN = "/v1/completions"
PROMPTS = [
    "The capital of France",
    "Gravity pulls",
    "A paper clip",
    "an apple falls",
    "Paris",
    "the Seine",
    "opens a",
    "page",
]


def body(kit: Any, prompt: str = PROMPTS[0], tokens: int = 500, stream: bool = True) -> dict[str, Any]:
    return {"model": kit.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}


@pytest.mark.parametrize("which", ["model", "batching"])
def test_64_concurrent_requests_say_what_each_says_alone(
    which: str, request: pytest.FixtureRequest, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(which)
    together: list[int] = []
    write = RowPool.write

    def counted(pool: RowPool, rows: Any, token_ids: Any) -> Any:
        together.append(len(rows))
        return write(pool, rows, token_ids)

    monkeypatch.setattr(RowPool, "write", counted)
    tokens = {prompt: 16 + 4 * number for number, prompt in enumerate(PROMPTS)}
    alone = {prompt: kit.alone(model, model.encode(prompt), tokens[prompt]) for prompt in PROMPTS}
    assert len(set(alone.values())) > 4

    async def ask(web: httpx.AsyncClient, prompt: str) -> str:
        lines = []
        async with web.stream("POST", PLAIN, json=body(kit, prompt, tokens[prompt])) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                lines.append(line)
        *chunks, done = kit.events(iter(lines))
        assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    async def all_at_once(url: str) -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as web:
            return await asyncio.gather(*(ask(web, prompt) for prompt in PROMPTS * 8))

    with kit.serving(model) as server:
        said = asyncio.run(all_at_once(server.url))
        assert said == [alone[prompt] for prompt in PROMPTS * 8]
        kit.wait_until(lambda: server.scheduler.active == server.scheduler.waiting == 0)
    assert max(together, default=0) == (8 if which == "batching" else 0)


class Client:
    """A raw connection that asks for a stream, so that it can be cut at will."""

    def __init__(self, server: Any, asked: dict[str, Any]) -> None:
        port = int(server.url.rpartition(":")[2])
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        content = json.dumps(asked).encode()
        head = f"POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def read_some(self) -> bytes:
        return self.connection.recv(65536)

    def end(self, *, reset: bool = False) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def test_beyond_the_queue_is_refused_at_once(model: Any, kit: Any) -> None:
    with kit.serving(model, slots=2, queue=2) as server:
        # Real decoding all the while: whoever ends is replaced.
        ended = threading.Event()

        def keep_busy() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as own:
                while not ended.is_set():
                    own.post(PLAIN, json=body(kit, tokens=900, stream=False))

        with ThreadPoolExecutor(4) as pool:
            busy = [pool.submit(keep_busy) for _ in range(4)]
            kit.wait_until(lambda: server.scheduler.full)
            seconds, refused = [], 0
            with httpx.Client(base_url=server.url, timeout=60) as web:
                while refused < 500:
                    started = time.perf_counter()
                    answer = web.post(PLAIN, json=body(kit, tokens=1, stream=False))
                    took = time.perf_counter() - started
                    if answer.status_code == 200:  # a place was free for a moment
                        continue
                    refused += 1
                    seconds.append(took)
                    assert answer.status_code == 429 and kit.is_refusal(answer.content)
                    assert 1 <= int(answer.headers["retry-after"]) <= 60
            ended.set()
            for future in busy:
                future.result(60)
        seconds.sort()
        # The one slowest of 500 measures what else runs on the machine, another worker of the suite for instance.
        assert seconds[494] < 0.1 and seconds[-1] < 1, (
            f"median {seconds[250]:.4f} s, 99% {seconds[494]:.4f} s, worst {seconds[-1]:.4f} s"
        )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_who_goes_frees_the_place(model: Any, kit: Any, stream: bool, reset: bool) -> None:
    with kit.serving(model, pace=0.02, slots=1, queue=2) as server:
        active = Client(server, body(kit, stream=stream))
        kit.wait_until(lambda: server.scheduler.active == 1)
        queued = Client(server, body(kit, stream=stream))
        kit.wait_until(lambda: server.scheduler.waiting == 1)
        queued.end(reset=reset)
        kit.wait_until(lambda: server.scheduler.waiting == 0, 2)
        assert server.scheduler.active == 1
        if stream:
            assert b"200 OK" in active.read_some()
        active.end(reset=reset)
        kit.wait_until(lambda: server.scheduler.active == 0, 2)


def test_clients_killed_at_random_leave_nothing(model: Any, kit: Any) -> None:
    with kit.serving(model, slots=4, queue=8) as server:

        def come_and_go(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(12):
                client = Client(server, body(kit, draw.choice(PROMPTS), draw.randrange(1, 300), draw.random() < 0.6))
                client.connection.settimeout(draw.choice([0.001, 0.02, 0.1]))
                try:
                    while client.read_some() and draw.random() < 0.9:
                        pass
                except TimeoutError:
                    pass
                client.end(reset=draw.random() < 0.5)

        with ThreadPoolExecutor(10) as pool:
            list(pool.map(come_and_go, range(10)))
        kit.wait_until(lambda: server.scheduler.active == server.scheduler.waiting == 0, 10)
        web = httpx.Client(base_url=server.url)
        assert web.post(PLAIN, json=body(kit, tokens=3, stream=False)).is_success
        metrics = web.get("/metrics").text
        assert "gradmap_slots_active 0.0" in metrics and "gradmap_queue_depth 0.0" in metrics


def test_who_does_not_read_holds_no_slot(model: Any, kit: Any) -> None:
    """A generation goes on to its end, whether or not its client takes the text."""
    with kit.serving(model, slots=1, queue=1) as server:
        idle = Client(server, body(kit, tokens=1000))
        kit.wait_until(lambda: server.scheduler.active == 1)
        answer = httpx.post(server.url + PLAIN, json=body(kit, tokens=2, stream=False), timeout=30)
        assert answer.is_success
        idle.end()


def test_waiting_counts_towards_the_time_limit(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.05, slots=1, queue=2, timeout=1.0) as server:
        running = Client(server, body(kit))
        kit.wait_until(lambda: server.scheduler.active == 1)
        time.sleep(0.3)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                httpx.post, server.url + PLAIN, json=body(kit, tokens=400, stream=False), timeout=30
            ).result(10)
        assert waiting.status_code == 504 and kit.is_refusal(waiting.content)
        kit.wait_until(lambda: server.scheduler.active == server.scheduler.waiting == 0)
        assert 'gradmap_generations_total{outcome="timeout"} 2.0' in httpx.get(server.url + "/metrics").text
        running.end()


def test_shutdown_finishes_what_is_under_way(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.01, slots=1, queue=2) as server:
        asked = [body(kit, tokens=30, stream=False), body(kit, tokens=5, stream=False)]
        with ThreadPoolExecutor(3) as pool:
            posts = [pool.submit(httpx.post, server.url + PLAIN, json=one, timeout=30) for one in asked]
            kit.wait_until(lambda: server.scheduler.active + server.scheduler.waiting == 2)
            drained = pool.submit(server.drain, 20.0)
            kit.wait_until(lambda: httpx.get(server.url + "/ready").status_code == 503)
            refused = httpx.post(server.url + PLAIN, json=asked[0])
            assert refused.status_code == 503 and refused.headers["retry-after"] and kit.is_refusal(refused.content)
            assert httpx.get(server.url + "/health").is_success
            assert drained.result(20) is True
            assert [post.result(20).status_code for post in posts] == [200, 200]


def test_shutdown_that_takes_too_long_says_so_in_the_stream(model: Any, kit: Any) -> None:
    with kit.serving(model, pace=0.02, slots=1, queue=1) as server:
        client = Client(server, body(kit, tokens=900))
        kit.wait_until(lambda: server.scheduler.active == 1)
        assert server.drain(0.1) is False
        server.stop()
        received = b""
        while part := client.read_some():
            received += part
        assert b"[DONE]" not in received and b'"code":"shutting_down"' in received
        client.end()
