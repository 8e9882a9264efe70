"""That the live comparison is fair, and that the app can run for long."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROMPT = "What is the capital of France?"
# One visitor who asks every few seconds, for an hour.
REQUESTS, WARM_UP, VISIT = 900, 300, 30


def test_a_model_is_as_fast_as_its_copy(kit: SimpleNamespace, slow_model: Path) -> None:
    """Two sessions of the same file, some hundred steps in turn: what the page would say is 1.00."""
    compare = kit.load_module("compare")
    settings = kit.load_module("generation").Settings
    models = compare.Models(kit.load_model("onnx", slow_model), kit.load_model("onnx", slow_model))
    ratios = []
    for number in range(3):
        comparison = compare.start_comparison(
            models, PROMPT, settings(max_new_tokens=200, temperature=1.0, seed=number)
        )
        for _ in compare.run(comparison, lambda: False):
            pass
        assert comparison.original.token_ids == comparison.pruned.token_ids
        assert comparison.shared_steps == 199
        ratios.append(comparison.speed_ratio)
    print(ratios)
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.05), ratios


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_an_hour_of_visitors_leaves_no_memory_behind(kit: SimpleNamespace, pair: Any, tmp_path: Path) -> None:
    """Requests one after the other, each visitor with a session of its own, with errors and changes of precision."""
    from gradio_client import Client

    def ask(count: int) -> None:
        for number in range(count):
            if number % VISIT == 0:
                client = Client(app.url, verbose=False)
            if number % 25 == 24:
                with pytest.raises(Exception, match="Type a prompt"):
                    client.predict(" ", api_name="/compare")
                continue
            answer = client.predict(
                f"Number {number}: {PROMPT}",
                max_new_tokens=8 + number % 24,
                precision="float32" if number % 100 >= 90 else "int8",
                api_name="/compare",
            )
            assert answer["original"]["finish_reason"] in ("stop", "length")

    with kit.running_app(kit.deploy(tmp_path / "app", pair), PRUNED_MODEL=str(pair.pruned_onnx)) as app:
        ask(WARM_UP)
        before = resident(app.process.pid)
        ask(REQUESTS)
        after = resident(app.process.pid)
        print(f"{before:,} -> {after:,} bytes")
        assert after < before * 1.05, f"{before:,} -> {after:,} bytes"
