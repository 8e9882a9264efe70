"""Screens files before the upload: only expected file types, and nothing private to this machine or its user.

Reads headers, graphs, texts and images, but not tensor data.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradmap_hub.errors import UnsafeToPublish
from gradmap_hub.layout import COMPANION_FILES, RESULTS_FOLDER, is_companion, legal_texts

_MODEL_SUFFIXES = (
    ".safetensors", ".onnx", ".onnx_data", ".json", ".md", ".txt", ".jinja", ".model", ".png", ".svg", ".jpg", ".webp",
)  # fmt: skip
_SUFFIXES = {"model": _MODEL_SUFFIXES, "space": (*_MODEL_SUFFIXES, ".py", ".css", ".html", ".js", ".mjs", ".wasm")}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".msgpack", ".h5")
# Gigabytes of tensor data and nothing else.
_DATA_ONLY = (".onnx_data",)
# hf_ and 34 letters on the real Hub; organisations once had api_org_. Tokens of an embedded Hub begin with hf_local_.
_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|hf_local_[0-9a-f]{40})")
_TOKEN_BEGINS = (b"hf_", b"api_org_")
_BLOCK = 1 << 24
# Longer than any match.
_OVERLAP = 1 << 13
_HEADER_LIMIT = 100_000_000
_REMOVE = "Remove it from the folder, then publish again."
# Words in every card or app; a host with such a name is not private.
_OUR_WORDS = ("gradmap-hub", "transformers", "safetensors", "onnxruntime", "huggingface", "tokenizers", "original")


@dataclass(frozen=True)
class Private:
    """What must not be published. `token`: the user's; `places`: {description, such as "your home folder": path};
    `host`: the name of this machine."""

    token: str | None = None
    places: Mapping[str, Path] | None = None
    host: str | None = None


def this_machine(token: str | None, places: Mapping[str, Path], known: Iterable[str] = ()) -> Private:
    """What is private on this machine. `places`: further {description: path}; `known`: published names, in which the
    host name may occur."""
    host = socket.gethostname()
    if not _is_distinctive(host) or any(host.lower() in name.lower() for name in (*known, *_OUR_WORDS)):
        host = None
    return Private(token, {"your home folder": Path(os.path.expanduser("~")), **places}, host)


def screen(folder: Path, kind: str, private: Private) -> None:
    """Check every file below `folder`. `kind`: "model" or "space".

    Raises:
        UnsafeToPublish: names the file and the problem.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UnsafeToPublish(name, "is a link that points outside the folder", hint=_REMOVE)
        if path.is_dir():
            continue
        if not path.is_file():  # reading a FIFO would never end
            raise UnsafeToPublish(name, "is not a regular file", hint=_REMOVE)
        files[name] = path
    screen_files(files, kind, private)


def screen_files(files: Mapping[str, Path], kind: str, private: Private) -> None:
    """Check files by their names in the repository. `kind`: "model" or "space".

    Raises:
        UnsafeToPublish: names the file and the problem.
    """
    patterns = list(_patterns(private))
    for name, path in files.items():
        check_kind(name, kind)
        if path.suffix in _DATA_ONLY:
            continue
        original = is_companion(name) or path.name in COMPANION_FILES or bool(legal_texts([path.name]))
        for what, pattern, literals in patterns:
            # Copied from the original byte for byte: its vocabulary may contain the host name as a word.
            if original and what == _HOST:
                continue
            if any(_found(pattern, literals, block) for block in _blocks(path)):
                raise UnsafeToPublish(
                    name,
                    f"contains {what}",
                    hint="Remove it from the file, or recreate the folder; published data cannot be recalled.",
                )


def publishable(name: str, kind: str) -> bool:
    """Whether a file of this name has a type that is published. `kind`: "model" or "space"."""
    path = PurePosixPath(name)
    if path.parts[0] == RESULTS_FOLDER:  # the only hidden folder that the Hub reads
        return kind == "model" and len(path.parts) == 2 and path.suffix == ".yaml" and not path.stem.startswith(".")
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and (path.suffix.lower() in _SUFFIXES[kind] or bool(legal_texts([path.name])))


def check_kind(name: str, kind: str) -> None:
    """Check the type of a file by its name. `kind`: "model" or "space".

    Raises:
        UnsafeToPublish: it may run code when loaded, or has a type that is not published.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PICKLES:
        raise UnsafeToPublish(
            name, f"may run code when it is loaded ({suffix} files can contain pickled objects)", hint=_REMOVE
        )
    if not publishable(name, kind):
        raise UnsafeToPublish(name, "has a type that gradmap-hub does not publish", hint=_REMOVE)


_HOST = "the name of this machine"


def _found(pattern: re.Pattern[bytes], literals: tuple[bytes, ...], block: bytes) -> bool:
    """Whether the pattern matches in the block. The search for `literals`, of which every match contains one, is much
    faster than a pattern that begins with a lookbehind, and usually finds nothing."""
    text = block.lower() if pattern.flags & re.IGNORECASE else block
    return any(literal in text for literal in literals) and pattern.search(block) is not None


def _patterns(private: Private) -> Iterator[tuple[str, re.Pattern[bytes], tuple[bytes, ...]]]:
    """Description, pattern, and literals of which every match contains one (in lower case if case is ignored)."""
    if private.token:
        token = private.token.encode()
        yield "your token", re.compile(re.escape(token)), (token,)
    yield "a possible Hugging Face token", _TOKEN, _TOKEN_BEGINS
    for what, place in (private.places or {}).items():
        pattern = _place_pattern(place)
        if pattern is not None:
            yield f"the path of {what}", pattern, _written(place)
    if private.host:
        host = private.host.encode()
        pattern = re.compile(rb"(?<![\w.-])" + re.escape(host) + rb"(?![\w-])", re.IGNORECASE)
        yield _HOST, pattern, (host.lower(),)


def _place_pattern(place: Path) -> re.Pattern[bytes] | None:
    """Matches the absolute path. A path of one part, such as /data, only matches with a further part."""
    parts = place.absolute().parts[1:]
    if not parts:
        return None
    written = {re.escape(form) for form in _written(place)}
    after = rb"(?![\w-])" if len(parts) > 1 else rb"[/\\]+[\w.]"
    return re.compile(rb"(?<![\w./-])(?:" + b"|".join(sorted(written)) + rb")" + after)


def _written(place: Path) -> tuple[bytes, ...]:
    """An absolute path as in a text, and escaped as in JSON."""
    text = str(place.absolute())
    return text.encode(), json.dumps(text)[1:-1].encode()


def _is_distinctive(host: str) -> bool:
    """Whether a host name is unlikely to occur in a text as a word."""
    return host not in ("localhost", "localhost.localdomain") and (
        len(host) > 7 or (len(host) > 3 and bool(re.search(r"[\d-]", host)))
    )


def _blocks(path: Path) -> Iterator[bytes]:
    """The screened parts of a file, in overlapping blocks."""
    with path.open("rb") as stream:
        if path.suffix == ".safetensors":
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            yield stream.read(min(length, _HEADER_LIMIT))
            return
        before = b""
        while block := stream.read(_BLOCK):
            yield before + block
            before = block[-_OVERLAP:]
