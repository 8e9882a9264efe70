"""Recognises an earlier push in a target repository by the metadata that it contains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gradmap_hub.comparison import COMPARE, parse_comparison
from gradmap_hub.errors import SourceError
from gradmap_hub.layout import (
    CARD,
    COMPANION_FILES,
    RESULTS_FOLDER,
    TEMPLATES_FOLDER,
    WEIGHTS,
    WEIGHTS_INDEX,
    legal_texts,
)
from gradmap_hub.record import FILE_NAME, parse_record

# Patterns of the names of our files. A file with another name is from somebody else.
_OURS = {
    "model": (
        f"{TEMPLATES_FOLDER}/*.jinja",
        CARD, FILE_NAME, "config.json", "generation_config.json", WEIGHTS, "model-*-of-*.safetensors", WEIGHTS_INDEX,
        *COMPANION_FILES, "onnx/*", "assets/*.png", "assets/*.svg",
        f"{RESULTS_FOLDER}/*.yaml",
    ),
    "space": (
        CARD, COMPARE, "requirements.txt", "*.py", "*.css", "*.html", "*.js", "tokenizer.json",
        "original/*", "pruned/*", "vendor/*",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """Identifies an earlier push: `fits` tells whether the content of `file` at the head is that of one."""

    file: str
    fits: Callable[[bytes], bool]


@dataclass(frozen=True)
class Terms:
    """What the user allows for a target. `public`: it may be public; `update`: an earlier push, identified by its
    `mark`, may be replaced."""

    public: bool = False
    update: bool = False
    mark: Mark | None = None


def model_mark(base_name: str, target: str) -> Mark:
    """A model repository is an earlier push if its gradmap.json names the same base and this target."""

    def fits(content: bytes) -> bool:
        try:
            record = parse_record(content, FILE_NAME)
        except SourceError:
            return False
        return record.target == target and record.base.name == base_name

    return Mark(FILE_NAME, fits)


def space_mark(base_name: str, model_target: str) -> Mark:
    """A Space is an earlier push if its compare.json names the same base and this pruned model."""

    def fits(content: bytes) -> bool:
        facts = parse_comparison(content)
        return facts is not None and (facts.pruned.repo_id, facts.original.name) == (model_target, base_name)

    return Mark(COMPARE, fits)


def is_ours(name: str, kind: str) -> bool:
    """Whether a file of this name is one of ours. `kind`: "model" or "space"."""
    nested = "/" in name
    matching = (pattern for pattern in _OURS[kind] if nested == ("/" in pattern) and fnmatchcase(name, pattern))
    return any(matching) or bool(legal_texts([name]))
