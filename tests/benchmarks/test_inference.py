"""The lines under the table of `make bench-inference`: each must be able to say no."""

from __future__ import annotations

import math

import pytest

from benchmarks.inference import PYTORCH, Entry, claims, lines
from gradmap_hub.evaluation.speed import Timed


def entry(backend: str, speed: float, loss: float = 0.0, *, size: int = 100, model: str = "pruned") -> Entry:
    """`speed`: against PyTorch of the pruned model; `loss`: of its perplexity."""
    times = Timed([0.1] * 3, [1 / speed] * 3)
    nll = [3 + math.log(1 + loss)] * 2
    return Entry(model, backend, size, one=times, many=times, cold=[1.0] if backend != PYTORCH else [], nll=nll)


GOOD = {
    "original": entry(PYTORCH, 0.8, model="original"),
    "pruned": entry(PYTORCH, 1.0),
    "fp32": entry("fp32", 1.7),
    "genai": entry("genai", 2.1),
    "int8": entry("int8", 5.5, 0.01, size=30),
    "peer": entry("llama.cpp Q8_0", 5.0, 0.005),
}


def said(**changed: Entry) -> list[str]:
    return [holds for _, holds, _ in claims(list({**GOOD, **changed}.values()))]


def test_all_of_them_hold() -> None:
    assert said() == ["yes"] * 7
    assert len(lines(list(GOOD.values()))) == len(GOOD)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"int8": entry("int8", 4.9, 0.01, size=30), "peer": entry("llama.cpp Q8_0", 1.0)}, 0),
        ({"original": entry(PYTORCH, 0.95, model="original")}, 1),
        ({"fp32": entry("fp32", 1.5)}, 2),
        ({"genai": entry("genai", 1.9)}, 3),
        ({"int8": entry("int8", 5.5, 0.01, size=60)}, 4),
        ({"peer": entry("llama.cpp Q8_0", 6.0, 0.005)}, 6),
    ],
)
def test_each_can_fail(changed: dict[str, Entry], place: int) -> None:
    found = said(**changed)
    assert found[place] == "no"


def test_what_costs_too_much_is_no_candidate() -> None:
    lossy = entry("int8", 9.0, 0.05, size=30)
    assert not any("within its limit" in line for line, _, _ in claims(list({**GOOD, "int8": lossy}.values())))


def test_a_peer_that_loses_more_is_not_compared() -> None:
    assert len(said(peer=entry("llama.cpp Q4_0", 9.0, 0.2))) == 6
