"""A shell without job control starts background commands with SIGINT ignored; ours stop on it all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def test_server_started_with_sigint_ignored_stops_on_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the child
    try:
        server = subprocess.Popen(
            [sys.executable, "-m", "gradmap_hub", "hub", "--root", str(tmp_path / "root")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert server.stdout is not None and server.stdout.readline().startswith("http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) in (0, 130)
    finally:
        server.kill()
        server.wait()
