"""Trying again: how often, how long to wait in between, and what a busy Hub asks for in its answers.

Which failures are worth another try is for the caller to say (`hub.worth_retrying`); nothing here knows HTTP beyond the
two headers with which a Hub says how long to stay away.
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

# "api";r=0;t=37 - one policy of a RateLimit header: what remains, and the seconds until it is filled again.
_POLICY = re.compile(r'"[^"]*"((?:\s*;\s*[a-z]+=[^;,]*)*)')


@dataclass(frozen=True)
class Patience:
    """Waits of `first`, twice that, ... seconds up to `longest`, each shortened at random by up to half so that many
    clients do not come back together; at most `tries` tries and `total` seconds of waiting. What the Hub itself asks
    for is waited for in full, up to `longest_asked` seconds."""

    tries: int = 5
    first: float = 1.0
    longest: float = 16.0
    longest_asked: float = 120.0
    total: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random


# Before any work: the user is there and waits for an answer.
BRIEF = Patience(tries=3, first=0.5, total=130.0)


@dataclass(frozen=True)
class Retry:
    """A failure that may pass. `asked`: the seconds that the Hub wants to be left alone, if it says so."""

    reason: str
    asked: float | None = None


def persist(
    action: Callable[[], T],
    patience: Patience,
    judge: Callable[[Exception], Retry | None],
    say: Callable[[str], None],
) -> T:
    """Call `action` until it succeeds, fails for good (`judge` returns None), or patience runs out; the last failure
    is then raised as it came. Waits of which a user may wonder what happens are told to `say`."""
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
            say(_words(retry, wait, number, patience))
        patience.sleep(wait)
    raise AssertionError("a Patience allows at least one try")


def _wait(patience: Patience, number: int, retry: Retry) -> float:
    if retry.asked is not None:
        return min(retry.asked, patience.longest_asked)
    return min(patience.first * 2 ** (number - 1), patience.longest) * (1 - patience.draw() / 2)


def _words(retry: Retry, wait: float, number: int, patience: Patience) -> str:
    if retry.asked is None:
        return f"{retry.reason}; trying again in {wait:.1f} s ({number + 1} of {patience.tries})"
    asked = f"The Hub asks to wait {retry.asked:.0f} s ({retry.reason})"
    return asked if wait == retry.asked else f"{asked}; trying again after {wait:.0f} s"


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait, from `Retry-After` (seconds or a date) or else `RateLimit`."""
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
    """The wait of the policies that are used up; of all of them if none says that it is."""
    waits: list[tuple[bool, float]] = []
    for policy in _POLICY.finditer(header):
        values = dict(part.strip().split("=", 1) for part in policy[1].split(";") if "=" in part)
        if re.fullmatch(r"\d{1,9}", values.get("t", "")):
            waits.append((values.get("r") == "0", float(values["t"])))
    used_up = [wait for empty, wait in waits if empty]
    return max(used_up or [wait for _, wait in waits], default=None)
