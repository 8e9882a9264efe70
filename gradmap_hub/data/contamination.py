"""13-gram overlap of lower-cased words between evaluation and calibration text.

13 words is the length used in GPT-3's report (arXiv 2005.14165, appendix C) and in lm-evaluation-harness. A sequence
with a single shared 13-gram counts as contaminated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13
_WORD = re.compile(r"\w+")


def runs_of_words(text: str) -> Iterator[tuple[str, ...]]:
    """All 13-grams of lower-cased words of a text; none if it is shorter."""
    words = _WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(WORDS)), strict=False)


def shared_rows(rows: Sequence[str], calibration: Iterable[str]) -> list[int]:
    """The indices of the texts in `rows` that share a 13-gram with any text of `calibration`."""
    seen = {run for text in calibration for run in runs_of_words(text)}
    return [index for index, text in enumerate(rows) if any(run in seen for run in runs_of_words(text))]
