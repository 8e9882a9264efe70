"""How fast the original and the pruned model read and write, side by side in PyTorch.

The two take turns, round by round and in changing order, so that what else the machine does strikes both; what is
reported of their quotient is the median over the rounds and its range.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.sweeprecord import Rate, Speed

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 32, 5


def measure_speed(
    model: Any,
    pruned: Callable[[], AbstractContextManager[None]],
    ids: Tensor,
    *,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    round_done: Callable[[], None] = lambda: None,
) -> Speed:
    """Time `model` as it is and within `pruned()`, which makes it the pruned model for a while.

    `ids`: the prompt, (1, tokens) int64. Greedy tokens are written with the KV cache, batch 1.
    """
    parameter = next(model.parameters())
    prompt = ids.to(parameter.device)
    sides: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext, pruned)
    seconds: list[list[tuple[float, float]]] = [[], []]  # per side and round: prefill, decode
    for side in sides:  # the first run of each pays for allocations
        with side():
            _timed(model, prompt, min(2, new_tokens))
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            with sides[index]():
                seconds[index].append(_timed(model, prompt, new_tokens))
        round_done()
    prefill, decode = (
        _rate(*([count / taken[part] for taken in side] for side in seconds))
        for part, count in enumerate((prompt.shape[1], new_tokens))
    )
    return Speed(
        prefill,
        decode,
        prompt_tokens=prompt.shape[1],
        new_tokens=new_tokens,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=parameter.device.type,
        dtype=str(parameter.dtype).removeprefix("torch."),
    )


def _timed(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt, and of writing the tokens behind it."""
    with torch.no_grad():
        started = _now(prompt.device)
        output = model(prompt, use_cache=True, logits_to_keep=1)
        read = _now(prompt.device)
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        return read - started, _now(prompt.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run behind the calls that start them
    return time.perf_counter()


def _rate(original: Sequence[float], pruned: Sequence[float]) -> Rate:
    """Of tokens per second in each round."""
    quotients = [after / before for before, after in zip(original, pruned, strict=True)]
    return Rate(
        statistics.median(original),
        statistics.median(pruned),
        statistics.median(quotients),
        [min(quotients), max(quotients)],
    )
