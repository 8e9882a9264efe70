"""Selects the ONNX file of a folder that suits this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradmap_hub.errors import SourceError, UsageError

# File name -> what users call it. In the order of preference on a CPU: int8 costs under 2 % of perplexity and is the
# fastest that does; int4 costs more than a reader would expect of a small model, so it must be asked for.
NAMES = {
    "int8": "model_int8.onnx",
    "genai": "model_genai.onnx",
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int4": "model_int4.onnx",
}
ON_CPU = ("int8", "genai", "fp32", "int4")
# Graphs of weight-only integers are made for the CPU's kernels; a GPU prefers half precision.
ON_CUDA = ("fp16", "fp32", "int8", "int4")
# A session needs the file's bytes, as much again while it repacks the weights, and the cache.
_MEMORY_FACTOR = 2.0


@dataclass(frozen=True)
class Artifact:
    """One ONNX graph. `path`: relative to the folder, with forward slashes; `bytes`: graph plus external data."""

    name: str
    path: str
    bytes: int


def available_artifacts(sizes: Mapping[str, int]) -> list[Artifact]:
    """Return the known graphs among files {path: bytes}, either in onnx/ (as published) or next to the tokenizer."""
    found = []
    for name, file in NAMES.items():
        for path in (f"onnx/{file}", file):
            if path in sizes:
                data = sum(sizes.get(path + ending, 0) for ending in ("_data", ".data"))
                found.append(Artifact(name, path, sizes[path] + data))
                break
    return found


def choose_artifact(
    found: Sequence[Artifact], wanted: str = "auto", *, cuda: bool = False, memory: int | None = None
) -> Artifact:
    """Return the requested artifact, or with "auto" the best one for this machine.

    `wanted`: "auto", an artifact name, a file name or a path; `memory`: free bytes, default: measured.

    Raises:
        SourceError: the folder has no ONNX graph, or none fits into memory.
        UsageError: the requested artifact does not exist.
    """
    if not found:
        raise SourceError(
            "This folder has no ONNX model.", hint="Create one with `gradmap-hub export FOLDER --to onnx,int8`."
        )
    names = ", ".join(artifact.name for artifact in found)
    if wanted != "auto":
        for artifact in found:
            if wanted in (artifact.name, artifact.path, PurePosixPath(artifact.path).name):
                return artifact
        raise UsageError(f"There is no artifact {wanted!r} here; there is {names}.")
    order = ON_CUDA if cuda else ON_CPU
    ranked = sorted(
        (artifact for artifact in found if artifact.name in order), key=lambda entry: order.index(entry.name)
    )
    free = free_memory() if memory is None else memory
    for artifact in ranked or found:
        if cuda or free is None or artifact.bytes * _MEMORY_FACTOR <= free:
            return artifact
    raise SourceError(
        f"No artifact ({names}) fits into {(free or 0) / 1e9:.1f} GB of free memory.",
        hint="Free some memory, or select one with --artifact to skip this check.",
    )


def free_memory() -> int | None:
    """Return the bytes this process may still allocate, within its cgroup limit; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        free = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def cpu_count() -> int:
    """The processors this process may use, which in a container is often fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count
