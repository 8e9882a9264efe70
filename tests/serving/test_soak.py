"""Twenty thousand short requests: the process must not grow."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.slow

REQUESTS = 20_000
WARM_UP = 2_000
CLIENTS = 8


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_memory_does_not_grow(tiny_int8: Path, kit: Any) -> None:
    def ask(count: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        for number in range(count):
            body = {"model": kit.name, "prompt": f"Number {number}", "max_tokens": 1 + number % 4,
                    "stream": number % 2 == 0}  # fmt: skip
            if number % 10 == 0:
                body["n"] = 2  # refused
            if number % 97 == 0:
                connection.close()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == (400 if "n" in body else 200)
        connection.close()

    def ask_all(count: int) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(ask, [count // CLIENTS] * CLIENTS))

    with kit.command(tiny_int8, "--threads", "1", "-q") as server:
        ask_all(WARM_UP)
        before = resident(server.process.pid)
        ask_all(REQUESTS)
        after = resident(server.process.pid)
        print(f"{before:,} -> {after:,} bytes")
        assert after < before * 1.03, f"{before:,} -> {after:,} bytes"
