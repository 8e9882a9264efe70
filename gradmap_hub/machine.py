"""The machine and the versions of packages that can affect a result."""

from __future__ import annotations

import ipaddress
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def is_loopback(host: str) -> bool:
    """Whether a server that binds to `host`, a name or an address, is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cpu_count() -> int:
    """The number of processors that this process may use; in a container often fewer than the machine has. On macOS and
    Windows, all processors of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2
        pass
    return count


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
