"""Error responses with all that the client reads: status, X-Error-Code, X-Error-Message."""

from collections.abc import Mapping
from typing import Any


class HubError(Exception):
    """A request fails with this HTTP status.

    ``code`` becomes ``X-Error-Code``, which huggingface_hub maps to its exceptions; ``body`` is merged into the JSON
    response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.body = dict(body or {})
        self.headers = dict(headers or {})


class InvalidName(HubError, ValueError):
    """An invalid repository, revision or file name."""

    def __init__(self, message: str) -> None:
        HubError.__init__(self, 400, message)


class RepoNotFound(HubError):
    def __init__(self) -> None:
        super().__init__(404, "Repository not found", "RepoNotFound")


class RevisionNotFound(HubError):
    def __init__(self, revision: str) -> None:
        super().__init__(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class EntryNotFound(HubError):
    def __init__(self, message: str = "Entry not found", commit: str | None = None) -> None:
        # With the commit, the client caches that the file does not exist there.
        headers = {"X-Repo-Commit": commit} if commit else {}
        super().__init__(404, message, "EntryNotFound", headers=headers)


class RepoExists(HubError):
    def __init__(self, kind: str, repo_id: str) -> None:
        super().__init__(409, f"You already created this {kind} repo: {repo_id}")


class StaleParent(HubError):
    def __init__(self) -> None:
        super().__init__(412, "A commit has happened since. Please refresh and try again.")


class Forbidden(HubError):
    def __init__(self) -> None:
        super().__init__(403, "You have read access but not the required permissions for this operation")


class Unauthorized(HubError):
    def __init__(self, message: str = "Invalid username or password.") -> None:
        super().__init__(401, message)


class Gated(HubError):
    def __init__(self, kind: str, repo_id: str, authenticated: bool) -> None:
        if authenticated:
            status, rest = 403, "You are not in the authorized list. Visit the repository to ask for access."
        else:
            status, rest = (
                401,
                "You must have access to it and be authenticated to access it. Please log in.",
            )
        super().__init__(status, f"Access to {kind} {repo_id} is restricted. {rest}", "GatedRepo")
