"""Selects the ONNX file of a folder that suits this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradmap_hub.errors import SourceError, UsageError
from gradmap_hub.formats import FORMATS, ONNX_FOLDER, graph_names, preferred

# A session needs the bytes of the file, the same again while it repacks the weights, and the KV cache.
_MEMORY_FACTOR = 2.0


@dataclass(frozen=True)
class Artifact:
    """One ONNX graph. `name`: as in `--artifact`, such as "int8" or "fp32"; `path`: relative to the model folder, with
    forward slashes; `bytes`: size of the graph and its external data."""

    name: str
    path: str
    bytes: int


def available_artifacts(sizes: Mapping[str, int]) -> list[Artifact]:
    """Return the known graphs among `sizes`, {path in the model folder: bytes}, the preferred one first.

    Each is looked up in onnx/ (as published), then next to the tokenizer.
    """
    found = []
    for row in preferred():
        if row.limits is None:  # not an ONNX graph
            continue
        names = [name for name in (row.file, row.former) if name]
        for path in [path for name in names for path in (f"{ONNX_FOLDER}/{name}", name)]:
            if path in sizes:
                data = sum(sizes.get(path + ending, 0) for ending in ("_data", ".data"))
                found.append(Artifact(row.artifact, path, sizes[path] + data))
                break
    return found


def _names(artifact: Artifact) -> list[str]:
    """The file name in the path of a graph, and the other file names of its format."""
    rows = [row for row in FORMATS.values() if row.artifact == artifact.name]
    return [PurePosixPath(artifact.path).name, *(name for row in rows for name in graph_names(row))]


def choose_artifact(
    found: Sequence[Artifact], wanted: str = "auto", *, cuda: bool = False, memory: int | None = None
) -> Artifact:
    """Return the requested artifact, or with "auto" the best one for this machine.

    Args:
        found: the artifacts of the model, as `available_artifacts` returns them.
        wanted: "auto", an artifact name, a file name or a path.
        cuda: choose for a GPU, whose memory is not checked, instead of the CPU.
        memory: free bytes for "auto"; None: as measured by `free_memory`.

    Raises:
        SourceError: there is no ONNX graph, or none fits into memory.
        UsageError: the requested artifact does not exist.
    """
    if not found:
        raise SourceError(
            "The model has no ONNX file.", hint="Create one with `gradmap-hub export FOLDER --to onnx,int8`."
        )
    names = ", ".join(artifact.name for artifact in found)
    if wanted != "auto":
        for artifact in found:
            if wanted in (artifact.name, artifact.path) or PurePosixPath(wanted).name in _names(artifact):
                return artifact
        raise UsageError(f"The model has no artifact {wanted!r}. Choose one of: {names}.")
    ranks = {row.artifact: row.on_cuda if cuda else row.on_cpu for row in FORMATS.values()}
    ranked = sorted(
        (artifact for artifact in found if ranks[artifact.name] is not None), key=lambda entry: ranks[entry.name] or 0
    )
    free = free_memory() if memory is None else memory
    for artifact in ranked or found:
        if cuda or free is None or memory_needed(artifact) <= free:
            return artifact
    raise SourceError(
        f"No artifact ({names}) fits into {(free or 0) / 1e9:.1f} GB of free memory.",
        hint="Free some memory, or select one with --artifact to skip this check.",
    )


def memory_needed(artifact: Artifact) -> float:
    """Return roughly how many bytes of memory a session of an artifact needs."""
    return artifact.bytes * _MEMORY_FACTOR


def free_memory() -> int | None:
    """Return the bytes this process may still allocate, within its cgroup limit; None if unknown (not on Linux)."""
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
