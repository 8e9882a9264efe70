"""The terms of documentation, code and templates, by the glossary below, and the length of the README."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "gradmap_hub", "exporters", "spaces", "model_cards", "benchmarks")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
MARKDOWN = (".md", ".jinja")
SUFFIXES = (*MARKDOWN, ".py")
README_LINES = 150

# Regular expression (one space stands for any break), what to write instead, and in which files. Python has identifiers
# such as `calibration_rows` and their docstrings, so sequences of text are told from rows of arrays in Markdown only.
GLOSSARY: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"\b(calibration|held-out|evaluation|scoring|fitting|selection) rows\b", "sequences", MARKDOWN),
    (r"\b(the|an?|our|its|same|with|without|after|before) corrections?\b", "compensation", MARKDOWN),
    (r"\b(reading|writing) speed", "prefill, decode", SUFFIXES),
    (r"\bnumber formats?\b", "dtype", SUFFIXES),
    (r"\blikeliest\b", "top-1, most likely", SUFFIXES),
    (r"\b(13|thirteen) words in a row\b", "13-gram overlap", SUFFIXES),
    (r"\b(eight|several|\d+) streams\b", "concurrent requests", SUFFIXES),
    (r"\b(kept|stored?|stores|keeps?) apart\b", "stored as LFS", SUFFIXES),
    (r"\bwhat came\b", "what was returned", SUFFIXES),
    (r"\bcounts? for nothing\b", "is ignored", SUFFIXES),
    (r"\bgo(es)? before the record", "override the record's", SUFFIXES),
    (r"\bcannot be meant\b", "invalid argument", SUFFIXES),
    (r"\banswers? in the making\b", "running generations", SUFFIXES),
    (r"\bwith a word why\b", "with the reason", SUFFIXES),
    (r"\bso many percent\b", "N percent", SUFFIXES),
)

# A line break with what surrounds it in a paragraph, a comment, a docstring or a string literal of several lines. An
# empty line ends a paragraph.
BREAK = re.compile(r"""[ \t]*["']?[ \t]*\n(?![ \t]*\n)[ \t]*(?:[#>]|[rf]{0,2}["'])?[ \t]*|[ \t]+""")


def joined(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with every break as one space, and (offset in it, offset in `text`) at the start of each piece."""
    pieces, starts, length, end = [], [(0, 0)], 0, 0
    for found in BREAK.finditer(text):
        pieces += [text[end : found.start()], " "]
        length += found.start() - end + 1
        end = found.end()
        starts.append((length, end))
    return "".join(pieces) + text[end:], starts


def hits(text: str, pattern: str) -> list[tuple[int, str]]:
    """(line, the words) of all matches; lines begin with 1."""
    flat, starts = joined(text)
    found = []
    for match in re.finditer(pattern, flat, re.IGNORECASE):
        here, there = starts[bisect_right(starts, (match.start(), len(text))) - 1]
        found.append((text.count("\n", 0, there + match.start() - here) + 1, match.group()))
    return found


@cache
def sources() -> dict[str, str]:
    files = [ROOT / page for page in PAGES]
    for folder in FOLDERS:
        files += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize(("pattern", "instead", "suffixes"), GLOSSARY, ids=[instead for _, instead, _ in GLOSSARY])
def test_the_terms_are_those_of_the_field(pattern: str, instead: str, suffixes: tuple[str, ...]) -> None:
    found = [
        f"{name}:{line}: {words}"
        for name, text in sources().items()
        if name.endswith(suffixes)
        for line, words in hits(text, pattern)
    ]
    assert not found, f"write {instead!r}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("One.\nIn the Number format.", 2),
        ("Its number\nformat.", 1),
        ('x = (\n    "its number "\n    f"format"\n)', 2),
        ("# its number\n# format", 1),
        ("    # first\n    # its number\n    # format", 2),
        ("> its number\n> format", 1),
        ("its number\n\nformat", None),
        ("number_format", None),
    ],
)
def test_a_phrase_is_found_across_lines(text: str, line: int | None) -> None:
    assert [found for found, _ in hits(text, r"\bnumber format")] == ([] if line is None else [line])


def test_the_readme_is_short() -> None:
    assert len(sources()["README.md"].splitlines()) <= README_LINES
