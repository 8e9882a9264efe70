"""What computes: the machine, and the versions of the packages that may show in a result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

_VERSIONED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "numpy",
)


def cpu_count() -> int:
    """The processors this process may use. macOS and Windows only tell how many there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def hardware() -> str:
    return f"{platform.machine()}, {cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Of the packages whose version may show in a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
