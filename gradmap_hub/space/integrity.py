"""Whether a Space folder contains only the app that is installed here.

A folder may come from somebody else, in an archive beside a model. Its app is run with the rights of the user, and
published under the user's account.
"""

from __future__ import annotations

from pathlib import Path

from gradmap_hub.space.app import STANDALONE, content_folder
from gradmap_hub.space.plan import ORIGINAL_FOLDER
from gradmap_hub.space.zerogpu import ZERO_REQUIREMENTS

# What the app consists of; and what else is in its folder and is only read.
_CODE, _DATA = (".py", ".css"), (".json", ".md", ".txt")
_REQUIREMENTS = "requirements.txt"


def foreign_code(folder: Path) -> str | None:
    """The first entry of a Space folder that could be run and is not of the installed app; None if there is none.

    Every module and style sheet must equal the installed one byte for byte, and every line of requirements.txt one of
    the installed requirements. Another folder than that of the stored original could shadow a package.
    """
    content = list(content_folder().iterdir())
    installed = {path.name: path for path in (*content, *STANDALONE) if path.suffix in _CODE}
    wanted = {line for path in content if path.name.startswith("requirements-") for line in _lines(path)}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or (path.is_dir() and path.name not in (ORIGINAL_FOLDER, "__pycache__")):
            return path.name
        if not path.is_dir() and not path.is_file():  # a pipe, which would be read for ever
            return path.name
        if path.name == _REQUIREMENTS and not set(_lines(path)) <= wanted | ZERO_REQUIREMENTS:
            return path.name
        if path.is_dir() or path.suffix in _DATA or path.name.startswith(".git"):
            continue
        ours = installed.get(path.name)
        if ours is None or path.read_bytes() != ours.read_bytes():
            return path.name
    return None


def foreign_entry(folder: Path) -> str | None:
    """The first entry of a folder that would stay beside the app if it were written there, and could be run with it;
    None if there is none."""
    content = {path.name for path in (*content_folder().iterdir(), *STANDALONE)} | {_REQUIREMENTS}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = path.name in content or path.suffix in _DATA or path.name.startswith(".git")
        if path.is_dir():
            known = not path.is_symlink() and path.name in (ORIGINAL_FOLDER, "__pycache__")
        if not known:
            return path.name
    return None


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
