"""Renders chat templates in a process with limits of time and memory.

A template is a program from somebody else: one message can make it loop for ever, or build a text that fills the
memory. Neither can be stopped within a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from gradmap_hub.runtime import render_worker
from gradmap_hub.runtime.prompting import ModelError

# Wall-clock seconds per CPU second of the worker, on a machine that decoding keeps busy.
_SLOWDOWN = 4


class LimitedRenderer:
    """Renders as `prompting.render_chat` does; an instance is a `Render`. Threads take turns.

    The worker process starts with the first call, and again after it was ended at a limit. It ends with this object, or
    with this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
        """The prompt of messages ({"role", "content"}), up to the start of the answer.

        Raises:
            ModelError: the template fails, or takes more time or memory than `render_worker` allows.
        """
        task = json.dumps({"template": template, "messages": [dict(turn) for turn in messages], "tokens": dict(tokens)})
        with self._lock:
            line = self._ask(task.encode() + b"\n")
        try:
            answer = json.loads(line)
        except ValueError:  # it was ended before it answered
            raise ModelError(
                f"The model's chat template failed: it takes more than {render_worker.SECONDS} seconds or "
                f"{render_worker.MEMORY / 1e9:.1f} GB for these messages."
            ) from None
        if "text" in answer:
            return answer["text"]
        raise ModelError(answer["error"])

    def close(self) -> None:
        """End the worker process, even while it renders."""
        if self._worker is not None:
            _end(self._worker)

    def _ask(self, task: bytes) -> bytes:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            worker = self._worker = _start()
            weakref.finalize(self, _end, worker)
        assert worker.stdin is not None and worker.stdout is not None
        watch = threading.Timer(_SLOWDOWN * render_worker.SECONDS, worker.kill)
        watch.daemon = True
        watch.start()
        line = b""
        try:
            worker.stdin.write(task)
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:  # it died before it read the task
            pass
        finally:
            watch.cancel()
            if not line.endswith(b"\n"):  # after Ctrl-C too: the answer would be taken for that of the next task
                _end(worker)
        return line


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", render_worker.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not yet written
                continue
