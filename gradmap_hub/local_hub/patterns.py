"""Which files are stored as LFS (.gitattributes) and which are ignored (.gitignore)."""

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .errors import HubError
from .names import RepoType

REGULAR_LIMIT = 10 * 1024 * 1024
#: Limit in characters of a pattern: that of a path.
_PATTERN_LIMIT = 4096
#: Limit of patterns in a .gitignore, each matched against every file and folder. Common templates have about 200.
_IGNORE_LIMIT = 1000
#: Limit of patterns in a .gitattributes, which gets a line for each LFS file that no other line covers.
_ATTRIBUTES_LIMIT = 10_000
_CLASS = re.compile(r"\[([!^]?)(\]?(?:\[:[a-z]+:\]|[^\]])*)\]")
_NOTHING = re.compile(r"(?!)")

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


class _Glob:
    """A git wildmatch pattern for whole paths. A match takes time linear in the path, whatever the pattern.

    The set of positions in the pattern that a path may have reached is a bit mask, which each character of the path
    advances at once. There is no backtracking: in a regular expression, a few dozen stars can take forever.
    """

    def __init__(self, pattern: str) -> None:
        # Masks of the positions ...
        self._literals: dict[str, int] = {}  # that this character advances by one
        self._classes: dict[re.Pattern[str], int] = {}  # likewise, for "[a-z]"
        self._one = 0  # that any character but a slash advances by one: "?"
        self._stars = 0  # that any character but a slash keeps, or that are skipped: "*"
        self._folders = 0  # that whole folders keep, or that are skipped with the next position: "**/"
        self._inside = 0  # the position after it: within the name of such a folder
        self._any = 0  # that any character advances by one: a final "/**"
        self._rest = 0  # the end after it, which any character keeps
        last_bracket = pattern.rfind("]")  # without one, each "[" would search for it
        place = at = 0
        while at < len(pattern):
            bit = 1 << place
            if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
                while pattern.startswith("**/", at):  # several are equivalent to one
                    at += 3
                self._folders |= bit
                self._inside |= bit << 1
                place += 2
            elif pattern.startswith("/**", at) and at + 3 == len(pattern):
                self._add_literal("/", bit)
                self._any, self._rest = bit << 1, bit << 2
                place, at = place + 2, at + 3
            elif pattern[at] == "*":
                while pattern.startswith("*", at):  # several are equivalent to one
                    at += 1
                self._stars |= bit
                place += 1
            elif pattern[at] == "?":
                self._one |= bit
                place, at = place + 1, at + 1
            elif pattern[at] == "[" and at < last_bracket and (found := _CLASS.match(pattern, at)):
                members = _character_class(found)
                self._classes[members] = self._classes.get(members, 0) | bit
                place, at = place + 1, found.end()
            else:
                at += pattern[at] == "\\" and at + 1 < len(pattern)
                self._add_literal(pattern[at], bit)
                place, at = place + 1, at + 1
        self._end = 1 << place

    def _add_literal(self, char: str, bit: int) -> None:
        self._literals[char] = self._literals.get(char, 0) | bit

    def matches(self, path: str) -> bool:
        places = self._passed(1)
        for char in path:
            taken = self._literals.get(char, 0) | self._any
            kept = self._rest
            if char == "/":
                back = (places & self._inside) >> 1
                entered = 0
            else:
                taken |= self._one
                for members, bits in self._classes.items():
                    if places & bits and members.match(char):
                        taken |= bits
                kept |= self._stars | self._inside
                back, entered = 0, (places & self._folders) << 1
            places = self._passed((places & taken) << 1 | places & kept | back | entered)
            if not places:
                return False
        return bool(places & self._end)

    def _passed(self, places: int) -> int:
        """``places`` and those reached from them without a character: a star can follow "**/", but not the reverse."""
        places |= (places & self._folders) << 2
        return places | (places & self._stars) << 1


def _character_class(found: re.Match[str]) -> re.Pattern[str]:
    inside = found[2].replace("\\", "\\\\").replace("[:space:]", r"\s").replace("[:digit:]", r"\d")
    escaped = re.sub(r"([\[&~|])", r"\\\1", inside)
    try:
        return re.compile(f"[{'^' if found[1] else ''}{escaped}]")
    except re.error:
        return _NOTHING  # git ignores patterns with an invalid class


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> tuple[_Glob, bool]:
    """The matcher of a pattern, and whether it is for whole paths or (without a slash) for names in any folder."""
    return _Glob(pattern.removeprefix("/")), "/" in pattern


def _matches(glob: tuple[_Glob, bool], path: str) -> bool:
    matcher, whole = glob
    return matcher.matches(path if whole else path.rpartition("/")[2])


@lru_cache(maxsize=16)  # the same text for all files of a commit
def _lfs_rules(attributes: str) -> tuple[tuple[tuple[_Glob, bool], bool], ...]:
    """The patterns of .gitattributes that decide about LFS, each with its decision."""
    rules: list[tuple[tuple[_Glob, bool], bool]] = []
    for line in attributes.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        filters = [word for word in words[1:] if word in ("filter=lfs", "-filter", "!filter")]
        if filters:
            _check_pattern(".gitattributes", words[0], len(rules) + 1, _ATTRIBUTES_LIMIT)
            rules.append((_glob(words[0]), filters[-1] == "filter=lfs"))
    return tuple(rules)


def is_lfs_tracked(attributes: str, path: str) -> bool:
    """Whether .gitattributes stores ``path`` as LFS; the last matching line decides.

    Raises:
        HubError: 400, .gitattributes has too many or too long patterns.
    """
    for glob, tracked in reversed(_lfs_rules(attributes)):
        if _matches(glob, path):
            return tracked
    return False


def _check_pattern(file: str, pattern: str, number: int, limit: int) -> None:
    if number > limit:
        raise HubError(400, f"{file} has more than {limit:,} patterns")
    if len(pattern) > _PATTERN_LIMIT:
        raise HubError(400, f"{file} has a pattern of more than {_PATTERN_LIMIT:,} characters")


def track(attributes: str, paths: Iterable[str]) -> str:
    """``attributes`` with a line added, as on the Hub, for each path that it does not yet store as LFS."""
    lines: list[str] = []
    for path in sorted(paths):
        if not is_lfs_tracked(attributes, path):
            quoted = re.sub(r"\s", "[[:space:]]", re.sub(r"([*?\[\]\\])", r"\\\1", path))
            _check_pattern(".gitattributes", quoted, 0, _ATTRIBUTES_LIMIT)
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
    """Whether .gitignore ignores ``path`` or one of its parent folders.

    Raises:
        HubError: 400, .gitignore has too many or too long patterns.
    """
    rules = _ignore_rules(ignore)
    parts = path.split("/")
    # A negation cannot re-include a file in an ignored folder, so parent folders are checked first, from the top.
    for depth in range(1, len(parts) + 1):
        if _ignores(rules, "/".join(parts[:depth]), is_folder=depth < len(parts)):
            return True
    return False


@dataclass(frozen=True)
class _IgnoreRule:
    glob: tuple[_Glob, bool]
    negated: bool
    folders_only: bool


@lru_cache(maxsize=16)
def _ignore_rules(ignore: str) -> tuple[_IgnoreRule, ...]:
    rules: list[_IgnoreRule] = []
    for raw in ignore.splitlines():
        line = raw.rstrip()
        if not line or line.startswith("#"):
            continue
        negated = line.startswith("!")
        pattern = line.removeprefix("!")
        folders_only = pattern.endswith("/")
        pattern = pattern.rstrip("/") if folders_only else pattern
        if pattern:
            _check_pattern(".gitignore", pattern, len(rules) + 1, _IGNORE_LIMIT)
            rules.append(_IgnoreRule(_glob(pattern), negated, folders_only))
    return tuple(rules)


def _ignores(rules: Sequence[_IgnoreRule], path: str, is_folder: bool) -> bool:
    for rule in reversed(rules):  # the last that matches decides
        if (is_folder or not rule.folders_only) and _matches(rule.glob, path):
            return not rule.negated
    return False
