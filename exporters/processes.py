"""A function of this package called in a process of its own.

Its memory is given back, its prints stay out of ours, a crash of a native library is a message, and Ctrl-C ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmap_hub.exporters import environment

# Nothing that is exported may be looked up on the Hub: the checkpoint is on disk, and whole.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class WorkerFailed(Exception):
    """The process ended without a result; the message is the last line that it wrote."""


def call(module: str, arguments: Mapping[str, Any]) -> Any:
    """What `gradmap_hub.exporters.MODULE.main(**arguments)` returns, computed in a fresh Python process of the
    environment for exports. Arguments and result are JSON; paths are strings.

    Raises:
        WorkerFailed: it raised, or died.
    """
    with tempfile.TemporaryDirectory(prefix="gradmap-") as folder:
        result = Path(folder) / "result.json"
        task = json.dumps({"module": module, "arguments": dict(arguments), "result": str(result)})
        # On Ctrl-C `run` kills the process before it lets the exception through.
        done = subprocess.run(
            [environment.python(), "-m", "gradmap_hub.exporters.worker"],
            input=task,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **_OFFLINE},
        )
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    raise WorkerFailed(_last_words(done))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}" + (f" after: {lines[-1]}" if lines else "")
    return lines[-1] if lines else f"exit status {done.returncode}, no message"
