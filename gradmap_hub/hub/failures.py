"""Interprets failures of the Hub's client: whether to retry, the HTTP status, and our exception for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from gradmap_hub.errors import HubError, NotLoggedIn, RateLimited
from gradmap_hub.hub.retry import Retry, asked_wait
from gradmap_hub.hub.transport import PASSING, RequestFailed, is_http, may_pass


def worth_retrying(error: Exception) -> Retry | None:
    """The reason to retry: the Hub is busy or failed, or the connection broke. None if the Hub rejected the request."""
    for cause in chain_of(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        if isinstance(cause, LocalEntryNotFoundError):  # wraps any failure of a download; its cause is the real one
            continue
        response = getattr(cause, "response", None)
        if response is not None:
            status = response.status_code
            if status in PASSING:
                return Retry(f"status {status}", asked_wait(response.headers))
            return None
        if may_pass(cause):
            return Retry(_reason(cause))
        if is_http(cause):
            return None
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes: the client wraps failures of uploads and downloads."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def response_of(error: BaseException) -> Any:
    """The response of the Hub in an exception or its causes; None if there is none."""
    return next((found for cause in chain_of(error) if (found := getattr(cause, "response", None)) is not None), None)


def status_of(error: BaseException) -> int | None:
    return getattr(response_of(error), "status_code", None)


def status_line(error: BaseException) -> str:
    """A failed request in a few words, without URL or headers."""
    status = status_of(error)
    if status is not None:
        return f"status {status}"
    return next((_reason(cause) for cause in chain_of(error) if is_http(cause)), type(error).__name__)


def _reason(error: BaseException) -> str:
    return error.reason if isinstance(error, RequestFailed) else type(error).__name__


def said_by(error: BaseException) -> str:
    """The error message of the Hub in parentheses, to append to ours; empty if the Hub sent none."""
    response = response_of(error)
    message = " ".join(str(getattr(response, "headers", {}).get("X-Error-Message") or "").split())
    return f" ({message[:200].rstrip('.')})" if message else ""


def token_refused(endpoint: str, known: str = "") -> NotLoggedIn:
    return NotLoggedIn(
        f"{endpoint} does not accept your token.{known}",
        hint="Make a new one with write access and run `hf auth login` or set HF_TOKEN.",
    )


def rate_limited(endpoint: str, error: BaseException, known: str = "") -> RateLimited:
    seconds = asked_wait(response_of(error).headers)
    asked = f" and requests a wait of {seconds:.0f} s" if seconds is not None else ""
    return RateLimited(
        f"The Hub at {endpoint} is limiting requests (status 429){asked}.{known}",
        hint="Run the same command again later; files already on the Hub are not sent again.",
    )


def unanswered(endpoint: str, error: BaseException) -> HubError:
    if status_of(error) == 429:
        return rate_limited(endpoint, error)
    return HubError(
        f"The Hub at {endpoint} did not answer as expected ({status_line(error)}).",
        hint="Check the connection (and HF_ENDPOINT), then run the same command again.",
    )
