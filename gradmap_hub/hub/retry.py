"""Retries: how many, how long to wait in between, and the waits that the Hub requests.

The caller decides which failures to retry (`failures.worth_retrying`). Of HTTP, this module knows only the two headers
that request a wait.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

# "api";r=0;t=37 - one policy of a RateLimit header: remaining requests, and seconds until the reset.
_POLICY = re.compile(r'"[^"]*"((?:\s*;\s*[a-z]+=[^;,]*)*)')


@dataclass(frozen=True)
class Patience:
    """Limits of retries: at most `tries` attempts and `total` seconds of waiting.

    The waits double from `first` to `longest` seconds, each shortened at random by up to half so that clients do not
    return at the same time. A wait requested by the Hub is kept in full, up to `longest_asked` seconds.
    """

    tries: int = 5
    first: float = 1.0
    longest: float = 16.0
    longest_asked: float = 120.0
    total: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random


# Before any work, while the user waits.
BRIEF = Patience(tries=3, first=0.5, total=130.0)


@dataclass(frozen=True)
class Retry:
    """A transient failure. `asked`: the wait in seconds that the Hub requests, if any."""

    reason: str
    asked: float | None = None


def persist(
    action: Callable[[], T],
    patience: Patience,
    judge: Callable[[Exception], Retry | None],
    say: Callable[[str], None],
) -> T:
    """Call `action` until it succeeds, fails permanently (`judge` returns None) or `patience` is used up; then raise
    the last exception unchanged. `say` gets a line before every wait."""
    waited = 0.0
    for number in range(1, patience.tries + 1):
        try:
            return action()
        except Exception as error:
            retry = judge(error)
            if retry is None or number == patience.tries:
                raise
            wait = _wait(patience, number, retry)
            if waited + wait > patience.total:
                raise
            waited += wait
            say(_description(retry, wait, number, patience))
        patience.sleep(wait)
    raise AssertionError("a Patience allows at least one attempt")


def _wait(patience: Patience, number: int, retry: Retry) -> float:
    if retry.asked is not None:
        return min(retry.asked, patience.longest_asked)
    return min(patience.first * 2 ** (number - 1), patience.longest) * (1 - patience.draw() / 2)


def _description(retry: Retry, wait: float, number: int, patience: Patience) -> str:
    if retry.asked is None:
        return f"{retry.reason}; retrying in {wait:.1f} s ({number + 1} of {patience.tries})"
    asked = f"The Hub requests a wait of {retry.asked:.0f} s ({retry.reason})"
    return asked if wait == retry.asked else f"{asked}; retrying after {wait:.0f} s"


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """The wait in seconds that an answer requests, from `Retry-After` (seconds or a date) or else `RateLimit`."""
    after = headers.get("Retry-After")
    if after is not None:
        seconds = _seconds(after)
        if seconds is not None:
            return seconds
    return _rate_limit(headers.get("RateLimit", ""))


def _seconds(after: str) -> float | None:
    if re.fullmatch(r"\s*\d{1,9}\s*", after):
        return float(after)
    try:
        moment = parsedate_to_datetime(after)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _rate_limit(header: str) -> float | None:
    """The longest wait of the exhausted policies, or of all policies if none is exhausted."""
    waits: list[tuple[bool, float]] = []
    for policy in _POLICY.finditer(header):
        values = dict(part.strip().split("=", 1) for part in policy[1].split(";") if "=" in part)
        if re.fullmatch(r"\d{1,9}", values.get("t", "")):
            waits.append((values.get("r") == "0", float(values["t"])))
    used_up = [wait for empty, wait in waits if empty]
    return max(used_up or [wait for _, wait in waits], default=None)
