"""Text of others, made safe to show."""

from __future__ import annotations

import json

import pytest

from gradmap_hub.units import markdown, one_line, plain, printable, printable_json, reason_of

# Changes the title, copies to the clipboard, hides what follows, reverses the reading order.
TITLE, CLIPBOARD, HIDDEN, REVERSED = "\x1b]0;owned\x07", "\x1b]52;c;b3duZWQ=\x07", "\x9b8m", "\u202egnp.exe"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 模型 🙂", "größe 模型 🙂"),
        ("no\u00a0break", "no\u00a0break"),
        (TITLE, r"\x1b]0;owned\x07"),
        (CLIPBOARD, r"\x1b]52;c;b3duZWQ=\x07"),
        (HIDDEN, r"\x9b8m"),
        (REVERSED, r"\u202egnp.exe"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("half \ud800", r"half \ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_an_answer_keeps_its_lines_and_no_codes() -> None:
    assert plain(f"def f():\n\treturn 1{TITLE}{HIDDEN}\r größe 👨‍👩‍👧") == "def f():\n\treturn 1]0;owned8m größe 👨‍👩‍👧"


@pytest.mark.parametrize("text", [TITLE, HIDDEN, REVERSED, "\x7f", "half \ud800", "\U000e0041", "größe\n\t"])
def test_json_means_the_same(text: str) -> None:
    document = printable_json(json.dumps({"name": text, text: [1]}, indent=2, ensure_ascii=False))
    assert json.loads(document) == {"name": text, text: [1]}
    assert document.replace("\n", "").isprintable()


def test_one_line_and_markdown() -> None:
    assert one_line(f"a\n{HIDDEN}  b") == "a 8m b"
    assert markdown("# <b>[x](y)</b>\n_a_ a_b") == r"\# &lt;b&gt;\[x\](y)&lt;/b&gt; \_a\_ a_b"


def test_the_reason_of_a_library_is_one_printable_line() -> None:
    assert reason_of(ValueError("one\x1b]0;title\x07\ntwo")) == "one ]0;title"
    assert reason_of(KeyError("silo")) == "KeyError: 'silo'"
    assert reason_of(AssertionError()) == "AssertionError"
    assert reason_of(ValueError("Give one of:\n\n  (1) a file,\n  (2) a class.\nMore.")) == "Give one of: (1) a file,"
    assert len(reason_of(ValueError("x" * 9_000))) == 200
