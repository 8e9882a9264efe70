"""Maps failed requests to exceptions: one class per cause; the message states what is known of the repository."""

from __future__ import annotations

import re
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
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.failures import chain_of, rate_limited, said_by, status_line, status_of, token_refused
from gradmap_hub.hub.transport import HttpFailure, Watch, is_http

T = TypeVar("T")

# Exceptions of the client: those of its HTTP library and OSError; RuntimeError for a failed upload; ValueError and
# KeyError for an unexpected answer or a rejected README.md.
CLIENT_ERRORS = (HttpFailure, OSError, RuntimeError, ValueError, KeyError)
ON_DISK = "All results are on disk"
AGAIN = f"{ON_DISK}. Run the same command again (push: with --resume); files already on the Hub are not sent again."


def step(
    hub: Hub, doing: str, repo_id: str, action: Callable[[], T], known: str = "", *, watch: Watch | None = None
) -> T:
    """Run `action` with retries; raises our exception if it fails.

    Args:
        hub: The Hub.
        doing: The action as a verb phrase before `repo_id`, such as "upload to", for the error message.
        repo_id: The repository.
        action: The call of the client.
        known: What is known of the repository after a failure, for the error message.
        watch: Counts uploaded bytes.

    Raises:
        PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited, HubError:
            see `refusal`.
    """
    try:
        return hub.attempt(action, watch=watch)
    except CLIENT_ERRORS as error:
        raise refusal(hub.endpoint, doing, repo_id, known, error) from error


def refusal(endpoint: str, doing: str, repo_id: str, known: str, error: Exception) -> Exception:
    """Our exception for a failed request; an error that is not from the Hub is returned unchanged.

    By status: 401 NotLoggedIn, 402 PaymentRequired, 403 NotAllowed, 404 TargetGone, 409 and 412 HubConflict, 429
    RateLimited, other rejections HubError; no answer or a server error PublishInterrupted."""
    status, said = status_of(error), said_by(error)
    known = f" {known}." if known else ""
    if status is None and not isinstance(error, ValueError | KeyError):
        if not any(is_http(cause) for cause in chain_of(error)):
            return error  # such as an unreadable file or a full disk
        return _interrupted(endpoint, doing, repo_id, known, error)
    match status:
        case 401:
            return token_refused(endpoint, known)
        case 402:
            return PaymentRequired(
                f"The Hub requires a paid plan or more storage to {doing} {repo_id}{said}.{known}",
                hint=f"{ON_DISK}. See {endpoint}/settings/billing, or publish from an account with a plan.",
            )
        case 403:
            return NotAllowed(
                f"Your token may not {doing} {repo_id}{said}.{known}",
                hint="Use a token with write access to that namespace.",
            )
        case 404 if doing != "create":
            return TargetGone(
                f"The Hub no longer finds {repo_id}{said}.{known}",
                hint=f"It existed before; somebody may have deleted or renamed it. {AGAIN}",
            )
        case 409 | 412:
            return HubConflict(
                f"The Hub rejected the request to {doing} {repo_id} because of another operation in it{said}.{known}",
                hint=AGAIN,
            )
        case 429:
            return rate_limited(endpoint, error, known)
        case None | 400 | 404 | 411 | 413 | 415 | 422:  # the Hub rejects README.md or another file
            # Without the parameters of addresses, which may be signed.
            message = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", " ".join(str(error).split()))[:300]
            return HubError(f"The Hub refused to {doing} {repo_id}: {message}", hint=f"{known} {ON_DISK}.".strip())
        case _:
            return _interrupted(endpoint, doing, repo_id, known, error)


def _interrupted(endpoint: str, doing: str, repo_id: str, known: str, error: Exception) -> PublishInterrupted:
    what = "The upload to" if doing == "upload to" else f"The attempt to {doing}"
    return PublishInterrupted(
        f"{what} {repo_id} at {endpoint} did not finish ({status_line(error)}).{known}", hint=AGAIN
    )
