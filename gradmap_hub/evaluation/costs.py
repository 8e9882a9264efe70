"""`evaluate`: how fast everything that can be run reads and writes, and how much memory it takes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradmap_hub.evaluation.speed import (
    NEW_TOKENS,
    PYTORCH,
    ROUNDS,
    Backend,
    Eager,
    OnnxRuntime,
    median_interval,
    peak_memory,
    take_turns,
)
from gradmap_hub.measurements import MeasuredSpeed, Rate
from gradmap_hub.progress import Reporter


class Runnable(NamedTuple):
    """`model`: original or pruned; `backend`: PYTORCH or the path of an ONNX file."""

    model: str
    backend: str
    batch: int


@dataclass(frozen=True)
class Peaks:
    """Peak resident bytes of each backend, None where that says nothing."""

    bytes: list[int | None]


@dataclass(frozen=True)
class Speeds:
    entries: list[MeasuredSpeed]


def memory(
    backends: Sequence[Runnable],
    folders: Mapping[str, Path],
    prompt_tokens: int,
    precision: tuple[Any, str],
    reporter: Reporter,
) -> Peaks:
    """Each backend in a process of its own, one at a time. `folders`: of each model; `precision`: data type and device
    of PyTorch, whose memory on a GPU is not seen."""
    dtype, device = precision
    threads = _threads()
    reporter.total(len(backends))
    found: list[int | None] = []
    for which, backend, batch in backends:
        if backend == PYTORCH and device != "cpu":
            found.append(None)
        else:
            try:
                peak = peak_memory(
                    folders[which],
                    backend,
                    threads,
                    batch=batch,
                    dtype=str(dtype).removeprefix("torch."),
                    prompt_tokens=prompt_tokens,
                )
            except subprocess.CalledProcessError:  # killed for want of memory, say: everything else is measured
                peak = None
            found.append(peak)
        reporter.advance()
    return Peaks(found)


def speed(
    backends: Sequence[Runnable],
    load: Callable[[str], Any],
    folder: Path,
    prompt: Sequence[int],
    reporter: Reporter,
) -> Speeds:
    """All backends in one process, in turns. `load` gives original or pruned model; `folder` holds the ONNX files."""
    models: dict[str, Any] = {}
    opened: list[Backend] = []
    for which, backend, batch in backends:
        if backend != PYTORCH:
            opened.append(OnnxRuntime(folder, backend, _threads(), NEW_TOKENS, batch))
            continue
        if which not in models:
            models[which] = load(which)
        opened.append(Eager(models[which], batch))
    reporter.total(len(backends) * (ROUNDS + 1))
    times = take_turns(opened, prompt, done=reporter.advance)
    return Speeds(
        [
            MeasuredSpeed(
                *backend,
                prefill=_rate(len(prompt) * backend.batch, timed.prefill),
                decode=_rate(NEW_TOKENS * backend.batch, timed.decode),
            )
            for backend, timed in zip(backends, times, strict=True)
        ]
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    return Rate(*median_interval([tokens / value for value in seconds]))
