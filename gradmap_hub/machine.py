"""The machine and the versions of packages that can affect a result."""

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
    """CPUs available to this process; on macOS and Windows all CPUs of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def hardware() -> str:
    return f"{platform.machine()}, {cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Version of Python and of the installed packages that can affect a result, by name."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
