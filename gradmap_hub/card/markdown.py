"""The filters of the card template: numbers as text, and text of users as Markdown that shows it literally.

Each accepts every value of its type; none prints `nan` or `inf`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

from gradmap_hub.measurements import TextMetric
from gradmap_hub.units import duration, markdown, one_line


class Safe(str):
    """Markdown that is printed unchanged."""

    __slots__ = ()


def escape(text: str) -> Safe:
    """Text that Markdown shows literally in a paragraph, a heading or a table cell."""
    return Safe(markdown(text))


def code(text: str) -> Safe:
    """Inline code; as HTML if it has special characters, because a pipe ends a table cell even within backticks."""
    line = one_line(text)
    if re.fullmatch(r"[\w./:@=+,()<>\- ]+", line) and line.isascii():
        return Safe(f"`{line}`")
    return Safe(f"<code>{escape(line)}</code>")


def codes(texts: Sequence[str]) -> Safe:
    """Several texts as inline code, separated by commas."""
    return Safe(", ".join(map(code, texts)))


def fenced(text: str, language: str = "") -> Safe:
    """A code block whose fence is longer than any run of backticks in `text`."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Safe(f"{fence}{language}\n{line}\n{fence}")


def literal(text: str) -> Safe:
    """A Python string literal on one line."""
    return Safe(json.dumps(one_line(text), ensure_ascii=False))


def link(text: str, url: str) -> Safe:
    """A Markdown link; only the text if the URL is not http(s)."""
    if urlsplit(url).scheme not in ("http", "https"):
        return escape(text)
    return Safe(f"[{escape(text)}]({quote(one_line(url), safe=':/?#@&=+,;%~')})")


def number(value: float) -> str:
    """A score or perplexity: no decimals from 1000, two from 1, else three significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal: 0.413 -> 41.3%."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "not finite"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign, such as -2.4."""
    return f"{100 * value:+z.1f}" if math.isfinite(value) else "not finite"


def rate(value: float) -> str:
    """A speed in tokens per second; one decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def ratio(value: float) -> str:
    """A ratio near one, with four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def with_interval(metric: TextMetric) -> str:
    """The value of a metric and its interval, such as `41.3% (40.0% to 43.0%)`."""
    shown = percent if metric.share else number
    low, high = map(shown, metric.interval)
    return f"{shown(metric.value)} ({low} to {high})"


def loss(value: float) -> str:
    """A loss in nats per token, with four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def small(value: float) -> str:
    """A difference that should be near zero, such as 3.1e-05."""
    return "0" if value == 0 else f"{value:.2g}" if math.isfinite(value) else "not finite"


def strength(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "not finite"


def change(after: float, before: float) -> str:
    """Relative change with its sign, such as -21.1%."""
    ratio = after / before - 1 if before else math.nan
    return f"{ratio:+,.1%}".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%") if math.isfinite(ratio) else "not finite"


def less_than(after: int, before: int) -> str:
    """The relative change of a count, such as `21.1% fewer`."""
    share = abs(1 - after / before) if before else 0.0
    return f"{share:.1%} {'fewer' if after <= before else 'more'}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}" if unit == "GB" else f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"


def part_word(part: str) -> str:
    """`mlp` or `attention` as printed."""
    return {"mlp": "MLP"}.get(part, part)


def ranges(indices: Sequence[int]) -> str:
    """Layer indices with runs of three or more joined: 3, 12 to 15, 17."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(str(index) for index in run) for run in runs
    )


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


# Available in the template under their names.
FILTERS = (
    code, codes, fenced, link, literal,
    change, duration, less_than, loss, number, part_word, percent, plural, points, ranges, rate, ratio, size, small,
    strength, with_interval,
)  # fmt: skip
