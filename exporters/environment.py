"""The Python that exports run in. Optimum has no release for transformers 5; where that is installed, exports run in an
environment beside it with transformers 4.57, made once and used by all later ones.

It lies over the present environment: what is there (torch, numpy, this package) is seen from it, and only what must be
another version, or is missing, is installed into it.
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
from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.progress import Reporter

_EXTRAS = ("cpu", "onnx")
_TRANSFORMERS = "transformers>=4.57,<4.58"
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def python() -> str:
    """The interpreter for exports.

    Raises:
        ExportEnvironmentError: there is none, because nobody has called `prepare`.
    """
    if not has_5():
        return sys.executable
    path = _python_of(folder())
    if not path.is_file():
        raise ExportEnvironmentError("There is no environment for ONNX exports yet.", hint="Run the export again.")
    return str(path)


def prepare(reporter: Reporter) -> None:
    """Make the environment if one is needed and there is none.

    Raises:
        ExportEnvironmentError: it cannot be made; nothing is left of it.
    """
    if not has_5() or _python_of(folder()).is_file():
        return
    reporter.start("Installing transformers 4.57 and Optimum for ONNX exports, once")
    target = folder()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _make(partial)
        try:
            partial.rename(target)
        except OSError:  # another run was faster
            if not _python_of(target).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    reporter.finish(str(target))


def folder() -> Path:
    """Where the environment is or will be: another one for other requirements, another Python or other packages."""
    packages = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    what = "\n".join([*requirements(), sys.version, *_packages(), *packages])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gradmap-hub" / f"onnx-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def requirements() -> list[str]:
    """What the extras for exports ask for, with the bounds of this package."""
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
        # Behind its own packages the present ones, with the .pth files among them.
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in _packages())
        (_own_packages(target) / "zz_present.pth").write_text(lines, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExportEnvironmentError(
            f"No virtual environment for ONNX exports could be made in {target.parent}: {error}",
            hint="Python's venv and ensurepip are needed (on Debian: apt install python3-venv). " + _ELSE,
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


_ELSE = "Or go on without ONNX (push: --no-onnx), or in an environment with gradmap-hub[cpu,onnx]."


def _packages() -> Sequence[str]:
    """The folders that packages are imported from here."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


def _python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _own_packages(environment: Path) -> Path:
    return next(_candidates(environment))


def _candidates(environment: Path) -> Iterator[Path]:
    yield from environment.glob("lib/python*/site-packages")
    yield environment / "Lib" / "site-packages"
