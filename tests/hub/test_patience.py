"""How long is waited, and what for."""

from __future__ import annotations

import importlib
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.hub.failures import worth_retrying
from gradmap_hub.hub.retry import Patience, Retry, asked_wait, persist
from gradmap_hub.hub.transport import RequestFailed


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=37'}, 37),
        ({"RateLimit": '"api";r=12;t=50, "resolvers";r=0;t=3'}, 3),
        ({"RateLimit": '"api"; r=0; t=9'}, 9),
        ({"RateLimit": "nonsense"}, None),
        ({"Retry-After": "2", "RateLimit": '"api";r=0;t=37'}, 2),
        ({"Retry-After": "soon", "RateLimit": '"api";r=0;t=37'}, 37),
    ],
)
def test_what_the_hub_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


def test_a_date() -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < (asked_wait({"Retry-After": moment}) or 0) <= 60


def waits_of(failures: int, retry: Retry | None, **settings: float) -> tuple[list[float], list[str], str]:
    waits: list[float] = []
    said: list[str] = []
    left = failures

    def action() -> str:
        nonlocal left
        if left:
            left -= 1
            raise OSError("no")
        return "yes"

    patience = Patience(sleep=waits.append, draw=lambda: 0.0, **settings)  # type: ignore[arg-type]
    try:
        answer = persist(action, patience, lambda error: retry, said.append)
    except OSError:
        answer = "gave up"
    return waits, said, answer


def test_waits_double_and_end() -> None:
    assert waits_of(0, Retry("x")) == ([], [], "yes")
    waits, said, answer = waits_of(4, Retry("status 503"))
    assert (waits, answer) == ([1, 2, 4, 8], "yes")
    assert said[0] == "status 503; retrying in 1.0 s (2 of 5)"
    assert waits_of(5, Retry("x"))[2] == "gave up"
    assert waits_of(9, Retry("x"), tries=8)[0] == [1, 2, 4, 8, 16, 16, 16]
    assert waits_of(1, None) == ([], [], "gave up")


def test_jitter_only_shortens() -> None:
    waits: list[float] = []
    draws = iter([0.0, 0.5, 1.0])

    def fail() -> None:
        raise OSError

    with pytest.raises(OSError):
        persist(fail, Patience(4, sleep=waits.append, draw=lambda: next(draws)), lambda error: Retry("x"), print)
    assert waits == [1, 1.5, 2]


def test_what_is_asked_for_is_waited_for_within_reason() -> None:
    assert waits_of(2, Retry("status 429", 37))[0] == [37, 37]
    waits, said, answer = waits_of(5, Retry("status 429", 3600))
    assert waits == [120, 120] and answer == "gave up"  # 300 s in all
    assert said[0] == "The Hub requests a wait of 3600 s (status 429); retrying after 120 s"


# The HTTP library of the client that is installed: requests, httpx or httpx2.
LIBRARY = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def http(*names: str) -> Exception:
    """An exception of the client's HTTP library, by the first of these names that it knows."""
    places = (LIBRARY, getattr(LIBRARY, "exceptions", None))
    return next(getattr(place, name) for name in names for place in places if hasattr(place, name))("no")


def answered(status: int, **headers: str) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers=headers, request=None)
    return HfHubHTTPError("no", response=response)


def wrapped(error: Exception) -> Exception:
    """As the client wraps a failed upload."""
    try:
        raise RuntimeError("Error while uploading 'x' to the Hub.") from error
    except RuntimeError as found:
        return found


@pytest.mark.parametrize(
    ("error", "worth"),
    [
        (answered(503), True),
        (answered(429), True),
        (answered(504), True),
        *[(answered(status), False) for status in (400, 401, 402, 403, 404, 409, 412, 501)],
        (wrapped(answered(500)), True),
        (wrapped(answered(403)), False),
        (http("ConnectError", "ConnectionError"), True),
        (http("ReadTimeout"), True),
        (http("ReadError", "ConnectionError"), True),
        (http("ProxyError", "Timeout"), True),
        (http("UnsupportedProtocol", "MissingSchema"), False),
        (RequestFailed(http("ReadTimeout")), True),
        (RequestFailed(http("InvalidURL")), False),
        (json.JSONDecodeError("x", "y", 0), True),  # the page of a proxy
        (FileNotFoundError(), False),
        (ValueError(), False),
        (KeyError("url"), False),
    ],
)
def test_what_may_pass(error: Exception, worth: bool) -> None:
    assert (worth_retrying(error) is not None) == worth


def test_the_wait_comes_from_the_answer() -> None:
    retry = worth_retrying(answered(429, **{"Retry-After": "7"}))
    assert retry == Retry("status 429", 7)
