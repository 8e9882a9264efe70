"""The budget of healing (tokens, time or steps), and the disk space of the original's stored predictions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from gradmap_hub.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """How long to heal: `amount` of `unit`, which is tokens, seconds or steps."""

    amount: int
    unit: Literal["tokens", "seconds", "steps"]


_UNITS: dict[str, tuple[int, Literal["tokens", "seconds", "steps"]]] = {
    "": (1, "steps"),
    "k": (10**3, "tokens"),
    "K": (10**3, "tokens"),
    "M": (10**6, "tokens"),
    "B": (10**9, "tokens"),
    "s": (1, "seconds"),
    "m": (60, "seconds"),
    "h": (3600, "seconds"),
}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)([kKMBsmh]?)", re.ASCII)


def parse_budget(text: str | int) -> Budget | None:
    """500k -> 500,000 tokens, 30m -> 1,800 seconds, 20 -> 20 steps; 0 -> None.

    Raises:
        UsageError: `text` is none of these.
    """
    found = _BUDGET.fullmatch(str(text).strip())
    factor, unit = _UNITS[found[2]] if found else (0, "steps")
    amount = Decimal(found[1]) * factor if found else Decimal("0.5")
    if amount != int(amount) or (found and amount == 0 and found[2]):
        raise UsageError(
            f"--heal takes tokens (500k, 10M), a time (30m, 2h) or a number of steps (20); got {str(text)!r}."
        )
    return Budget(int(amount), unit) if amount else None


# Number of most likely tokens stored for each predicted distribution.
TOP_K = 64


def index_bytes(vocabulary: int) -> int:
    """Bytes of a stored token id, for a vocabulary of this size."""
    return 2 if vocabulary <= 1 << 16 else 4


def teacher_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes on disk of the original's predictions for `tokens` tokens: per token TOP_K ids with float16
    log-probabilities, and the float16 probability of all other tokens together."""
    return tokens * (TOP_K * (index_bytes(vocabulary) + 2) + 2)
