"""Which files are stored as LFS (.gitattributes) and which are ignored (.gitignore)."""

import codecs
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from .names import RepoType

REGULAR_LIMIT = 10 * 1024 * 1024

_MODEL_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar
*.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
_MEDIA_PATTERNS = {
    "Audio files - uncompressed": "*.pcm *.sam *.raw",
    "Audio files - compressed": "*.aac *.flac *.mp3 *.ogg *.wav",
    "Image files - uncompressed": "*.bmp *.gif *.png *.tiff",
    "Image files - compressed": "*.jpg *.jpeg *.webp",
    "Video files - compressed": "*.mp4 *.webm",
}


def _tracked(pattern: str) -> str:
    return f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"


def default_attributes(repo_type: RepoType) -> str:
    """The .gitattributes that the Hub creates in a new repository of this type."""
    if repo_type != "dataset":
        return "".join(map(_tracked, _MODEL_PATTERNS.split()))
    lines: list[str] = []
    for pattern in _MODEL_PATTERNS.split():
        lines.append(_tracked(pattern))
        if pattern == "*.lfs.*":
            lines += [_tracked("*.lz4"), _tracked("*.mds")]
    for title, patterns in _MEDIA_PATTERNS.items():
        lines += [f"# {title}\n", *map(_tracked, patterns.split())]
    return "".join(lines)


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    """Compile a git wildmatch pattern to a regular expression for a whole path."""
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            parts.append("(?:[^/]+/)*")
            at += 3
        elif pattern.startswith("/**", at) and at + 3 == len(pattern):
            parts.append("/.+")
            at += 3
        elif pattern[at] == "*":
            parts.append("[^/]*")
            at += 1
        elif pattern[at] == "?":
            parts.append("[^/]")
            at += 1
        elif pattern[at] == "[" and (
            found := re.compile(r"\[([!^]?)(\]?(?:\[:[a-z]+:\]|[^\]])*)\]").match(pattern, at)
        ):
            inside = found[2].replace("\\", "\\\\").replace("[:space:]", r"\s").replace("[:digit:]", r"\d")
            parts.append(f"[{'^' if found[1] else ''}{inside.replace('[', chr(92) + '[')}]")
            at = found.end()
        elif pattern[at] == "\\" and at + 1 < len(pattern):
            parts.append(re.escape(pattern[at + 1]))
            at += 2
        else:
            parts.append(re.escape(pattern[at]))
            at += 1
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error:
        # Git ignores invalid patterns.
        return re.compile(r"(?!)")


def _matches(pattern: str, path: str) -> bool:
    if "/" in pattern:
        return _compile(pattern.removeprefix("/")).fullmatch(path) is not None
    return _compile(pattern).fullmatch(path.rpartition("/")[2]) is not None


def is_lfs_tracked(attributes: str, path: str) -> bool:
    """Whether .gitattributes stores ``path`` as LFS; the last matching line decides."""
    tracked = False
    for line in attributes.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        for word in words[1:]:
            if word in ("filter=lfs", "-filter", "!filter") and _matches(words[0], path):
                tracked = word == "filter=lfs"
    return tracked


def track(attributes: str, paths: Iterable[str]) -> str:
    """``attributes`` with a line added, as on the Hub, for each path that it does not yet store as LFS."""
    lines: list[str] = []
    for path in sorted(paths):
        if not is_lfs_tracked(attributes, path):
            quoted = re.sub(r"([*?\[\]\\])", r"\\\1", path).replace(" ", "[[:space:]]")
            # A leading slash anchors the pattern. It is added only if the name would read as a comment or negation.
            lines.append(_tracked(f"/{quoted}" if quoted[0] in "#!" else quoted))
    if lines and attributes and not attributes.endswith("\n"):
        attributes += "\n"
    return attributes + "".join(lines)


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are not UTF-8 text; a character truncated at the end is ignored."""
    if b"\x00" in sample:
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return False


def upload_mode(attributes: str, path: str, size: int, sample: bytes) -> Literal["lfs", "regular"]:
    if size > 0 and (is_lfs_tracked(attributes, path) or size > REGULAR_LIMIT or is_binary(sample)):
        return "lfs"
    return "regular"


def is_ignored(ignore: str, path: str) -> bool:
    """Whether .gitignore ignores ``path`` or one of its parent folders."""
    parts = path.split("/")
    # A negation cannot re-include a file in an ignored folder, so parent folders are checked first, from the top.
    for depth in range(1, len(parts) + 1):
        if _ignores(ignore, "/".join(parts[:depth]), is_folder=depth < len(parts)):
            return True
    return False


def _ignores(ignore: str, path: str, is_folder: bool) -> bool:
    ignored = False
    for raw in ignore.splitlines():
        line = raw.rstrip()
        if not line or line.startswith("#"):
            continue
        negated = line.startswith("!")
        pattern = line.removeprefix("!")
        if pattern.endswith("/"):
            if not is_folder:
                continue
            pattern = pattern.rstrip("/")
        if pattern and _matches(pattern, path):
            ignored = not negated
    return ignored
