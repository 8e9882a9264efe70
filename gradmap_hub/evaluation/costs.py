"""Prefill and decode speed and peak memory of both models in PyTorch and of every ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gradmap_hub.errors import MemoryNotMeasured
from gradmap_hub.evaluation.measurement import ORIGINAL, PRUNED, Context, Step
from gradmap_hub.evaluation.speed import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PYTORCH,
    ROUNDS,
    Backend,
    Eager,
    OnnxRuntime,
    median_interval,
    peak_memory,
    take_turns,
)
from gradmap_hub.machine import hardware
from gradmap_hub.measurements import MeasuredSpeed, Rate

BATCH = 8  # PyTorch is measured with this batch size and with 1


class Runnable(NamedTuple):
    """One model on one backend. `model`: ORIGINAL or PRUNED; `backend`: PYTORCH or the path of an ONNX file."""

    model: str
    backend: str
    batch: int


@dataclass(frozen=True)
class Peaks:
    """Peak resident bytes of each backend, None where not measured; `notes` give the reasons of those that failed."""

    bytes: list[int | None]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Speeds:
    """The speed of each backend, in the order of `runnables`."""

    entries: list[MeasuredSpeed]


def settings(context: Context) -> dict[str, int]:
    """The settings of the speed measurement: prompt tokens, new tokens and rounds."""
    return {"prompt": min(PROMPT_TOKENS, context.config.seq_len), "new_tokens": NEW_TOKENS, "rounds": ROUNDS}


def runnables(context: Context) -> list[Runnable]:
    """Everything that is timed: both models in PyTorch with batch 1 and BATCH, and every ONNX file with batch 1."""
    eager = [Runnable(which, PYTORCH, batch) for which in (ORIGINAL, PRUNED) for batch in (1, BATCH)]
    return eager + [Runnable(PRUNED, graph.path, 1) for graph in context.graphs]


def steps(context: Context) -> list[Step[Any]]:
    if not context.config.speed:
        return []
    inputs = {
        "backends": runnables(context),
        "files": [[graph.path, graph.sha256, graph.data_sha256] for graph in context.graphs],
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        **settings(context),
    }
    both = (ORIGINAL, PRUNED)
    return [
        Step(
            "memory",
            "Memory, one process per backend",
            Peaks,
            lambda: memory(context, runnables(context)),
            weights=both,
            inputs=inputs,
            describe=lambda found: f"{len(found.notes)} not measured" if found.notes else "",
            final=lambda found: not found.notes,
        ),
        Step(
            "speed",
            f"Speed, {ROUNDS} rounds in turn",
            Speeds,
            lambda: speed(context, runnables(context)),
            weights=both,
            inputs=inputs,
        ),
    ]


def result(context: Context, found: Mapping[str, Any]) -> list[MeasuredSpeed]:
    if not context.config.speed:
        return []
    for note in found["memory"].notes:
        context.reporter.note(note)
    pairs = zip(found["speed"].entries, found["memory"].bytes, strict=True)
    return [dataclasses.replace(entry, memory=peak) for entry, peak in pairs]


def memory(context: Context, backends: Sequence[Runnable]) -> Peaks:
    """Peak memory of each backend in its own process, one at a time. PyTorch on a GPU is not measured."""
    models = context.models
    context.reporter.total(len(backends))
    found = Peaks([])
    for which, backend, batch in backends:
        peak = None
        if backend != PYTORCH or models.device == "cpu":
            try:
                peak = peak_memory(
                    models.folders[which],
                    backend,
                    torch.get_num_threads(),
                    batch=batch,
                    dtype=str(models.dtype).removeprefix("torch."),
                    prompt_tokens=settings(context)["prompt"],
                )
            except MemoryNotMeasured as error:
                found.notes.append(f"{which.capitalize()}, batch {batch}: {error.message}")
        found.bytes.append(peak)
        context.reporter.advance()
    return found


def speed(context: Context, backends: Sequence[Runnable]) -> Speeds:
    """Load all backends in this process and time them in turns on the first sequence of the first text."""
    prompt = context.texts[0].ids[0, : settings(context)["prompt"]].tolist()
    models: dict[str, Any] = {}
    opened: list[Backend] = []
    for which, backend, batch in backends:
        if backend != PYTORCH:
            opened.append(OnnxRuntime(context.folder, backend, torch.get_num_threads(), NEW_TOKENS, batch))
            continue
        if which not in models:
            models[which] = context.models.load(which)
        opened.append(Eager(models[which], batch))
    context.reporter.total(len(backends) * (ROUNDS + 1))
    times = take_turns(opened, prompt, done=context.reporter.advance)
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


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    return Rate(*median_interval([tokens / value for value in seconds]))
