"""Whether an evaluation text holds what was calibrated on: 13 lower-cased words in a row, the same in both.

Thirteen words is the length that GPT-3's report (arXiv 2005.14165, appendix C) looked for, and that the harness uses.
A row counts as a whole: one run of shared words, and the model may have been fitted to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13
_WORD = re.compile(r"\w+")


def runs_of_words(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of 13 words of a text, in small letters; none if it is shorter."""
    words = _WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(WORDS)), strict=False)


def shared_rows(rows: Sequence[str], calibration: Iterable[str]) -> list[int]:
    """The indices of `rows` that share a run of words with a row of `calibration`."""
    seen = {run for text in calibration for run in runs_of_words(text)}
    return [index for index, text in enumerate(rows) if any(run in seen for run in runs_of_words(text))]
