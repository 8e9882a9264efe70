"""What only Linux has may be missing: the core works with it taken away from our own modules. This is no test on other
systems; docs/guide.md says on which this was run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # four commands, each in a process that nothing has imported for

# Libraries keep what they need; the modules of this package find what Windows and macOS lack missing.
ELSEWHERE = """
import builtins, ctypes, os, pathlib, runpy, signal, sys

real_import, real_cdll, real_read = builtins.__import__, ctypes.CDLL, pathlib.Path.read_text
missing = {"fcntl", "resource", "grp", "pwd", "termios", "tty"}

def importing(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__name__", "")).startswith("gradmap_hub")
    if ours and name.partition(".")[0] in missing:
        raise ImportError(f"No module named {name!r}")
    return real_import(name, globals, locals, fromlist, level)

class Cdll(real_cdll):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
        super().__init__(name, *args, **kwargs)

def reading(self, *args, **kwargs):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return real_read(self, *args, **kwargs)

builtins.__import__, ctypes.CDLL, pathlib.Path.read_text = importing, Cdll, reading
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "link"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("setitimer", "SIGXCPU", "SIGHUP"):
    if hasattr(signal, name):
        delattr(signal, name)
sys.argv = ["gradmap-hub", *sys.argv[1:]]
runpy.run_module("gradmap_hub", run_name="__main__")
"""


def elsewhere(*words: str | Path, cwd: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_without_what_only_linux_has(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """In a folder whose name has a space and letters beyond ASCII; the text has the line ends of Windows."""
    place = tmp_path / "Modèle à tester"
    place.mkdir()
    lines = text_file.read_text(encoding="utf-8").splitlines()
    (place / "texte é.txt").write_bytes("\r\n".join(lines).encode())
    quick = ["--samples", "4", "--seq-len", "32", "--eval-rows", "2", "--calibration", "texte é.txt", "--quiet"]
    elsewhere("prune", tiny_folder, "plus petit", "--layers", "1", "--heal", "2", *quick, cwd=place)
    assert (place / "plus petit" / "model.safetensors").is_file()
    elsewhere("export", "plus petit", "--to", "int8", "--text", "texte é.txt", "--quiet", cwd=place)
    answer = elsewhere("generate", "plus petit", "The river", "--max-tokens", "4", "--raw", cwd=place)
    assert answer.strip()
    assert "plus petit" in elsewhere("list", cwd=place)
