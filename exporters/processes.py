"""Calls a function of this package in its own process, which frees its memory, captures its output, turns a crash of a
native library into an error, and ends on Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmap_hub.exporters import environment

# Exports never access the Hub: the checkpoint on disk is complete.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# An export copies whole graphs; with huge pages it spends about a fifth less time (glibc only, others ignore it).
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# The environment variable that tells the worker who its parent is.
PARENT = "GRADMAP_EXPORT_PARENT"


def worker_environment() -> dict[str, str]:
    """The environment variables of an export process; a user's own GLIBC_TUNABLES are kept."""
    return {**_HUGE_PAGES, **os.environ, **_OFFLINE}


class WorkerFailed(Exception):
    """The process ended without a result; the message is its last line of output."""


def call(module: str, arguments: Mapping[str, Any]) -> Any:
    """Return `gradmap_hub.exporters.MODULE.main(**arguments)`, computed in a fresh process of the environment for
    exports. Arguments and result are JSON; paths are strings.

    Raises:
        WorkerFailed: the function raised an exception or the process died.
    """
    with tempfile.TemporaryDirectory(prefix="gradmap-") as folder:
        result = Path(folder) / "result.json"
        task = json.dumps({"module": module, "arguments": dict(arguments), "result": str(result)})
        # On Ctrl-C, `run` kills the process before it re-raises.
        done = subprocess.run(
            [environment.python(), "-m", "gradmap_hub.exporters.worker"],
            input=task,
            capture_output=True,
            text=True,
            errors="replace",
            env={**worker_environment(), PARENT: str(os.getpid())},
        )
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    raise WorkerFailed(_last_words(done))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
    if done.returncode < 0:
        said = f"; its last output: {lines[-1]}" if lines else ""
        return f"the process was killed by signal {-done.returncode}{said}"
    return lines[-1] if lines else f"exit status {done.returncode}, no message"
