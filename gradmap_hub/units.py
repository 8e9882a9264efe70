"""Human-readable numbers, and untrusted text made safe to show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ranges(indices: Sequence[int]) -> str:
    """[3, 12, 13, 14] -> '3, 12-14'."""
    parts: list[str] = []
    start = previous = indices[0]
    for index in [*indices[1:], None]:
        if index is not None and index == previous + 1:
            previous = index
            continue
        parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        if index is not None:
            start = previous = index
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """75 -> '75 s', 1860 -> '31 min', 7200 -> '2 h 0 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def printable(text: str, keep: str = "") -> str:
    """Text for a terminal or an error: unprintable characters are written as escapes, such as `\\x1b`, except those in
    `keep`. Untrusted names may contain codes that change the terminal's title or clipboard."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or _is_space(c) else ascii(c)[1:-1] for c in text)


def _is_space(character: str) -> bool:
    """Whether a character is one of the spaces between words, of any width."""
    return unicodedata.category(character) == "Zs"


def plain(text: str) -> str:
    """A model's answer for a terminal: without control characters, but with tabs and line feeds."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def printable_json(document: str) -> str:
    """A JSON document with every unprintable character except line feeds written as a JSON escape."""
    if document.isascii():
        return document.replace("\x7f", "\\u007f")  # all others below 128 are escapes already
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in document)


def _json_escape(character: str) -> str:
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + ((code - 0x10000) & 0x3FF):04x}"


def one_line(text: str) -> str:
    """The text without line breaks and other unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def reason_of(cause: BaseException | str, most: int = 200) -> str:
    """The message of a library's exception, or a text, as one printable line of at most `most` characters.

    It has the first line, and each further line as long as the one before ends with a colon. The exception's type is
    added where the message alone says little."""
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    last = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines))
    text = one_line(" ".join(lines[: last + 1]))
    if not text or isinstance(cause, (KeyError, AttributeError, TypeError)):
        text = f"{type(cause).__name__}{': ' * bool(text)}{text}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def markdown(text: str) -> str:
    """Text that Markdown shows literally in a paragraph, a heading or a table cell."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~#$!{}])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # a_b is no emphasis
