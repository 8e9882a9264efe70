"""What a failed write is called: one class for each cause, with what is certain about the repository then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gradmap_hub.errors import (
    HubConflict,
    HubError,
    NotAllowed,
    PaymentRequired,
    PublishInterrupted,
    TargetGone,
)
from gradmap_hub.hub.client import Hub, chain_of, rate_limited, said_by, status_line, status_of, token_refused
from gradmap_hub.hub.transport import HttpFailure, Watch, is_http

T = TypeVar("T")

# What the client raises: what its HTTP library does, a RuntimeError for a failed upload, and for an answer that it does
# not understand, or a refused README.md, one of the others.
CLIENT_ERRORS = (HttpFailure, OSError, RuntimeError, ValueError, KeyError)
ON_DISK = "What was built is on disk"
AGAIN = f"{ON_DISK}. Run the same command again (push: with --resume); what the Hub already has is not sent again."


def step(
    hub: Hub, doing: str, repo_id: str, action: Callable[[], T], known: str = "", *, watch: Watch | None = None
) -> T:
    """`action`, tried as often as makes sense; its failure in our words. `known`: what is certain then.

    Raises:
        PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited, HubError
    """
    try:
        return hub.attempt(action, watch=watch)
    except CLIENT_ERRORS as error:
        raise refusal(hub.endpoint, doing, repo_id, known, error) from error


def refusal(endpoint: str, doing: str, repo_id: str, known: str, error: Exception) -> Exception:
    """Our exception for a failed write; what is no failure of the Hub stays what it is."""
    status, said = status_of(error), said_by(error)
    known = f" {known}." if known else ""
    if status is None and not isinstance(error, ValueError | KeyError):
        if not any(is_http(cause) for cause in chain_of(error)):
            return error  # a file that cannot be read, a full disk
        return _interrupted(endpoint, doing, repo_id, known, error)
    match status:
        case 401:
            return token_refused(endpoint, known)
        case 402:
            return PaymentRequired(
                f"The Hub asks for a paid plan or more storage to {doing} {repo_id}{said}.{known}",
                hint=f"{ON_DISK}. See {endpoint}/settings/billing, or publish from an account with a plan.",
            )
        case 403:
            return NotAllowed(
                f"Your token may not {doing} {repo_id}{said}.{known}",
                hint="Use a token with write access to that namespace.",
            )
        case 404 if doing != "create":
            return TargetGone(
                f"The Hub finds no {repo_id} any more{said}.{known}",
                hint=f"It was there a moment ago: somebody may have deleted or renamed it. {AGAIN}",
            )
        case 409 | 412:
            return HubConflict(
                f"The Hub is busy with something else in {repo_id} and does not {doing} it now{said}.{known}",
                hint=AGAIN,
            )
        case 429:
            return rate_limited(endpoint, error, known)
        case None | 400 | 404 | 411 | 413 | 415 | 422:  # the Hub's judgement of README.md, or of a file
            words = " ".join(str(error).split())[:300]
            return HubError(f"The Hub refuses to {doing} {repo_id}: {words}", hint=f"{known} {ON_DISK}.".strip())
        case _:
            return _interrupted(endpoint, doing, repo_id, known, error)


def _interrupted(endpoint: str, doing: str, repo_id: str, known: str, error: Exception) -> PublishInterrupted:
    what = "The upload to" if doing == "upload to" else f"The attempt to {doing}"
    return PublishInterrupted(
        f"{what} {repo_id} at {endpoint} did not finish ({status_line(error)}).{known}", hint=AGAIN
    )
