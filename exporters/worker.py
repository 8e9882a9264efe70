"""The worker process of `processes.call`: `python -m gradmap_hub.exporters.worker`, with the task as JSON on stdin."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

from gradmap_hub.exporters.processes import PARENT


def main() -> None:
    _end_with_parent()
    warnings.filterwarnings("ignore")
    task = json.load(sys.stdin)
    module = importlib.import_module(f"gradmap_hub.exporters.{task['module']}")
    result = module.main(**task["arguments"])
    Path(task["result"]).write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies; otherwise its further output would never be removed."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1 and os.environ.get(PARENT) != "1":
            os._exit(1)  # the parent died before


if __name__ == "__main__":
    main()
