"""`gradmap-hub serve` as a process: address first, key, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

PLAIN = "/v1/completions"


def asked(kit: Any, tokens: int, prompt: str = "The capital of France") -> dict[str, Any]:
    return {"model": kit.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}


def read(url: str, body: dict[str, Any]) -> list[str]:
    with httpx.stream("POST", url + PLAIN, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        return list(answer.iter_lines())


def test_sigterm_under_load_loses_no_stream(tiny_onnx: Path, model: Any, kit: Any) -> None:
    prompts = ["The capital of France", "Gravity pulls", "A paper clip", "an apple falls", "Paris", "the Seine"]
    alone = {prompt: kit.alone(model, model.encode(prompt), 400) for prompt in prompts}
    with kit.command(tiny_onnx, "--slots", "3", "--threads", "1", "--log-requests") as server:
        assert httpx.get(server.url + "/ready").is_success
        with ThreadPoolExecutor(len(prompts)) as pool:
            streams = [pool.submit(read, server.url, asked(kit, 400, prompt)) for prompt in prompts]
            kit.wait_until(lambda: sum(map(httpx.get(server.url + "/ready").json().get, ("active", "waiting"))) == 6)
            server.process.send_signal(signal.SIGTERM)
            said = [kit.events(iter(stream.result(60))) for stream in streams]
        assert server.process.wait(20) == 0
        log = server.process.stderr.read()
    for prompt, (*chunks, done) in zip(prompts, said, strict=True):
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone[prompt]
    assert log.count(f"POST {PLAIN} 200") == 6 and "capital" not in log and "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tiny_onnx: Path, kit: Any, number: signal.Signals) -> None:
    with kit.command(tiny_onnx, "--slots", "1", "--threads", "1", "-q") as server:
        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(read, server.url, asked(kit, 1000)) for _ in range(8)]
            kit.wait_until(lambda: httpx.get(server.url + "/ready").json()["active"] == 1)
            server.process.send_signal(number)
            time.sleep(0.2)
            started = time.monotonic()
            server.process.send_signal(number)
            assert server.process.wait(20) == 0
            assert time.monotonic() - started < 6
            for stream in streams:
                assert stream.exception(20) is not None or "[DONE]" not in "".join(stream.result())
        assert "Traceback" not in server.process.stderr.read()


def test_key_and_warning(tiny_onnx: Path, kit: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("from-a-file\n")
    with kit.command(tiny_onnx, "--api-key-file", str(key), "--log-requests") as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer from-a-file"}
        assert httpx.get(server.url + "/v1/models", headers=headers).is_success
        server.process.terminate()
        assert server.process.wait(20) == 0
        log = server.process.stderr.read()
        assert "GET /v1/models 401" in log and "from-a-file" not in log and "warning" not in log
    with kit.command(tiny_onnx, "--host", "0.0.0.0") as server:
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert "no API key" in server.process.stderr.read()


def test_invalid_options_get_one_line(tmp_path: Path) -> None:
    from gradmap_hub.cli.serve import KEY_VARIABLE

    empty = tmp_path / "empty"
    empty.touch()
    for options in (
        ["--api-key-file", str(empty)],
        ["--api-key-file", "/nowhere"],
        ["--timeout", "0"],
        ["--port", "70000"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gradmap_hub", "serve", str(tmp_path), *options],
            capture_output=True, text=True, timeout=60, env={**os.environ, KEY_VARIABLE: ""},
        )  # fmt: skip
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("error ")


def test_the_module_is_light() -> None:
    heavy = ("uvicorn", "starlette", "onnxruntime", "pydantic", "prometheus_client", "torch", "transformers")
    code = f"import sys, gradmap_hub.cli.serve; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_server_needs_no_torch(tiny_onnx: Path) -> None:
    code = (
        "import sys\nfrom gradmap_hub import runtime\nfrom gradmap_hub.serving.server import Server\n"
        "from gradmap_hub.serving.settings import Settings\n"
        f"model = runtime.load({str(tiny_onnx)!r})\nServer(model, Settings(port=0)).start()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_shows_an_example() -> None:
    command = [sys.executable, "-m", "gradmap_hub", "serve", "-h"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Example" in done.stdout and "--api-key-file" in done.stdout
