"""The Python environment of exports. Optimum does not support transformers 5; if version 5 is installed, exports run in
a separate environment with transformers 4.57, which the first export creates and later ones reuse.

It is layered on the current environment: torch, numpy and this package are visible from it, and only packages that are
missing or need another version are installed into it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradmap_hub.errors import ExportEnvironmentError
from gradmap_hub.files import user_cache
from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.progress import Reporter

_EXTRAS = ("cpu", "onnx")
_TRANSFORMERS = "transformers>=4.57,<4.58"
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def python() -> str:
    """The path of the Python interpreter for exports.

    Raises:
        ExportEnvironmentError: the environment does not exist, because `prepare` was not called.
    """
    if not has_5():
        return sys.executable
    path = _python_of(folder())
    if not path.is_file():
        raise ExportEnvironmentError("The environment for ONNX exports does not exist.", hint="Run the export again.")
    return str(path)


def prepare(reporter: Reporter) -> None:
    """Create the environment if it is needed and does not exist.

    Raises:
        ExportEnvironmentError: it cannot be created; a partial one is removed.
    """
    if not has_5() or _python_of(folder()).is_file():
        return
    reporter.start("Installing transformers 4.57 and Optimum for ONNX exports (first export only)")
    target = folder()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _make(partial)
        try:
            partial.rename(target)
        except OSError:  # another process created it first
            if not _python_of(target).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    reporter.finish(str(target))


def folder() -> Path:
    """The environment's folder; its name depends on the requirements, the Python and the installed packages."""
    packages = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    what = "\n".join([*requirements(), sys.version, *_packages(), *packages])
    return user_cache() / f"onnx-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def requirements() -> list[str]:
    """The requirements of the extras for exports, with this package's version bounds."""
    lines = [_TRANSFORMERS]
    for line in importlib.metadata.requires("gradmap-hub") or ():
        wanted, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        if extra is not None and extra[1] in _EXTRAS:
            lines.append(wanted.strip())
    return lines


def _make(target: Path) -> None:
    try:
        venv.create(target, with_pip=True)
        # Its own packages come first, then the current environment's, including their .pth files.
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in _packages())
        (_own_packages(target) / "zz_present.pth").write_text(lines, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExportEnvironmentError(
            f"The virtual environment for ONNX exports could not be created in {target.parent}: {error}",
            hint="Python's venv and ensurepip are required (on Debian: apt install python3-venv). " + _ELSE,
        ) from error
    install = [str(_python_of(target)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*install, *requirements()], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {done.returncode}"
        raise ExportEnvironmentError(
            f"The packages for ONNX exports could not be installed: {said}",
            hint=f"Tried: pip install {shlex.join(requirements())}. " + _ELSE,
        )


_ELSE = "Or skip ONNX (push: --no-onnx), or run in an environment with gradmap-hub[cpu,onnx]."


def _packages() -> Sequence[str]:
    """The package folders of the current environment."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


def _python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _own_packages(environment: Path) -> Path:
    return next(_candidates(environment))


def _candidates(environment: Path) -> Iterator[Path]:
    yield from environment.glob("lib/python*/site-packages")
    yield environment / "Lib" / "site-packages"
