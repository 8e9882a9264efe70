"""Checks that a Space folder contains no code except the installed app.

A folder may come from somebody else, such as in an archive with a model. Its app would run with the user's rights, and
would be published under the user's account.
"""

from __future__ import annotations

from pathlib import Path

from gradmap_hub.space.app import REQUIREMENTS, STANDALONE, content_folder
from gradmap_hub.space.browser import PRUNED_FOLDER, page_files
from gradmap_hub.space.plan import ORIGINAL_FOLDER
from gradmap_hub.space.vendor import VENDOR, is_library
from gradmap_hub.space.zerogpu import ZERO_REQUIREMENTS

# Suffixes of the files of app and page; and of data files beside them, which are only read.
_CODE, _DATA = (".py", ".css", ".html", ".js"), (".json", ".md", ".txt")
# Folders of model files, and suffixes of files that a browser or Python could run.
_MODELS = (ORIGINAL_FOLDER, PRUNED_FOLDER)
_RUNNABLE = (".py", ".so", ".pyd", ".html", ".htm", ".js", ".mjs", ".css", ".wasm", ".svg", ".xhtml", ".xml")


def foreign_code(folder: Path) -> str | None:
    """The name of the first entry of a Space folder that could be run and is not part of the installed app or page;
    None if there is none.

    Every module, page and style sheet must equal the installed one byte for byte, every library must match its pinned
    sha256, and every line of requirements.txt must be one of the installed requirements. Other folders are refused,
    because they could shadow a package.
    """
    installed = {path.name: path for path in (*_installed(), *STANDALONE) if path.suffix in _CODE}
    requirements = [path for path in content_folder().iterdir() if path.name.startswith("requirements-")]
    wanted = {line for path in requirements for line in _lines(path)}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or (path.is_dir() and path.name not in (*_MODELS, VENDOR, "__pycache__")):
            return path.name
        if not path.is_dir() and not path.is_file():  # a pipe; reading it might never end
            return path.name
        if path.is_dir() and (found := _foreign_below(path)) is not None:
            return found
        if path.name == REQUIREMENTS and not set(_lines(path)) <= wanted | ZERO_REQUIREMENTS:
            return path.name
        if path.is_dir() or path.suffix in _DATA or path.name.startswith(".git"):
            continue
        ours = installed.get(path.name)
        if ours is None or path.read_bytes() != ours.read_bytes():
            return path.name
    return None


def _foreign_below(folder: Path) -> str | None:
    """The first file in the folder of libraries that is not one of them, or in a model folder that could be run."""
    for path in sorted(folder.rglob("*")) if folder.name != "__pycache__" else ():
        ours = path.is_file() and not path.is_symlink()
        if folder.name == VENDOR:
            ours = ours and is_library(path)
        elif path.suffix.lower() in _RUNNABLE:
            ours = False
        if not ours and not path.is_dir():
            return f"{folder.name}/{path.relative_to(folder).as_posix()}"
    return None


def _installed() -> list[Path]:
    return [*content_folder().iterdir(), *page_files()]


def foreign_entry(folder: Path) -> str | None:
    """The first entry of `folder` that writing the app there would not replace and that could be run with it; None if
    there is none."""
    content = {path.name for path in (*_installed(), *STANDALONE)} | {REQUIREMENTS}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = path.name in content or path.suffix in _DATA or path.name.startswith(".git")
        if path.is_dir():
            known = not path.is_symlink() and path.name in (*_MODELS, VENDOR, "__pycache__")
        if not known:
            return path.name
    return None


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
