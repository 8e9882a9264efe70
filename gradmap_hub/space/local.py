"""Runs a Space folder on this machine as Hugging Face does: `python app.py` with the Space variables as environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gradmap_hub.errors import GradmapError, MissingExtra

START_SECONDS = 120
# Environment variables that are passed on to the app.
_KEPT = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TMP", "TEMP", "SYSTEMROOT",
        "USERPROFILE", "APPDATA", "LOCALAPPDATA", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
        "HTTP_PROXY", "HTTPS_PROXY",
        "NO_PROXY", "ALL_PROXY",
    }
)  # fmt: skip
_KEPT_PREFIXES = (
    "HF_", "HUGGINGFACE_", "GRADIO_", "PYTHON", "LC_", "XDG_", "SSL_", "REQUESTS_", "CURL_", "OMP_", "MKL_",
    "OPENBLAS_", "CUDA_", "NVIDIA_", "ORT_", "TORCH_", "TRANSFORMERS_",
)  # fmt: skip


@contextmanager
def running_space(
    folder: Path, variables: Mapping[str, str], *, host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start the app and wait until it answers. Yields its URL and its process, and terminates the process at the end.

    Args:
        folder: The Space folder.
        variables: The Space variables.
        host: Address to bind to.
        port: Port to bind to; 0 takes any free one.

    Raises:
        MissingExtra: gradio is not installed.
        GradmapError: the app exited or did not answer within two minutes; the message has its last line of output.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtra("The comparison app", "space")
    port = port or free_port(host)
    url = f"http://{host}:{port}"
    environment = {
        **_environment(),
        **variables,
        "GRADIO_SERVER_NAME": host,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    # Compiled modules are not compared with the installed app, and Python would run them in place of the source.
    if (folder / "__pycache__").exists():
        shutil.rmtree(folder / "__pycache__")
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_up(url, process, log)
            yield url, process
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    log.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    """The variables that the app needs: the system's own, and the settings of the packages it imports."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _KEPT or name.upper().startswith(_KEPT_PREFIXES)
    }


def run_space(folder: Path, variables: Mapping[str, str], *, host: str, port: int, open_browser: bool) -> None:
    """Run the app until it exits or Ctrl-C. Prints its URL as the first line on stdout."""
    with running_space(folder, variables, host=host, port=port) as (url, process):
        print(url, flush=True)
        if open_browser:
            webbrowser.open(url)
        try:
            process.wait()
        except KeyboardInterrupt:
            return


def at_a_screen() -> bool:
    """Whether a browser window would be visible. Without a display, `webbrowser` may start a text browser in the
    terminal."""
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise GradmapError(f"The comparison app exited at startup: {last[0]}", hint=f"Its output is in {log}.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise GradmapError(
        f"The comparison app did not answer at {url} within {START_SECONDS} s.", hint=f"Its output is in {log}."
    )
