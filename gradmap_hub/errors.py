"""Every failure a user can meet. One class per cause, facts as attributes, phrased once by the command line.

`message` is one line that says what is wrong; `hint`, if any, says what to do next. Neither ever holds a token.
"""

from __future__ import annotations


class GradmapError(Exception):
    """Base class of all expected failures (exit status 1)."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GradmapError):
    """An argument that cannot be meant (exit status 2)."""


class SourceError(GradmapError):
    """The model source does not exist or is not a model."""


class RepositoryNotFound(SourceError):
    """No such repository on the Hub, or it is private and the token does not open it."""

    def __init__(self, repo_id: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"There is no model {repo_id} on the Hub that you can see.",
            hint=hint or "Check the spelling; for a private model, log in with `hf auth login` or set HF_TOKEN.",
        )
        self.repo_id = repo_id


class RevisionNotFound(SourceError):
    """The repository exists, the branch, tag or commit does not."""

    def __init__(self, repo_id: str, revision: str) -> None:
        super().__init__(
            f"{repo_id} has no revision {revision!r}.",
            hint="Give a branch, a tag or a commit of that repository.",
        )
        self.repo_id = repo_id
        self.revision = revision


class GatedRepository(SourceError):
    """The metadata is public, the weights are not ours to read."""

    def __init__(self, repo_id: str, url: str) -> None:
        super().__init__(
            f"Access to the weights of {repo_id} is restricted and your token has not been granted it.",
            hint=f"Ask for access on {url}, then run the same command again.",
        )
        self.repo_id = repo_id


class UnsupportedArchitecture(SourceError):
    """A model type that is not known to be safe to prune."""

    def __init__(self, model_type: str, reason: str, supported: tuple[str, ...]) -> None:
        super().__init__(
            f"Models of type {model_type!r} cannot be pruned: {reason}.",
            hint=f"Supported model types: {', '.join(supported)}.",
        )
        self.model_type = model_type


class BrokenCheckpointError(SourceError):
    """Weights that are missing, cut short, or in a format that is never loaded (pickle)."""


class RemoteCodeRefused(SourceError):
    """The repository wants its own Python code to be executed."""


class OutputExists(GradmapError):
    """The output folder already holds something."""


class CalibrationError(GradmapError):
    """The calibration or evaluation text cannot be used."""


class DiskTooSmall(GradmapError):
    """Not enough room for what is about to be written."""

    def __init__(self, path: str, needed: int, free: int) -> None:
        super().__init__(
            f"Not enough disk space at {path}: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free.",
            hint="Free some space, or choose another place with --output (and HF_HOME for downloads).",
        )
        self.needed = needed
        self.free = free


class MissingExtra(GradmapError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed.",
            hint=f"Install them with: pip install 'gradmap-hub[{extra}]'",
        )
        self.extra = extra


class ExportEnvironmentError(GradmapError):
    """The environment that exports run in, beside transformers 5, is not there and cannot be made."""


class VerificationError(GradmapError):
    """The saved model or an export does not compute what it should. Nothing is published."""


class MemoryNotMeasured(GradmapError):
    """The process whose peak memory is measured died. `reason`: its last line on stderr, or the signal."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"Memory of {backend} was not measured: {reason}")
        self.backend = backend
        self.reason = reason


class SpaceImpossible(GradmapError):
    """There is nothing that a comparison Space of the two models could run."""


class HubError(GradmapError):
    """The Hub refused or could not be reached."""


class NotLoggedIn(HubError):
    """There is no token, or the Hub does not accept it."""


class NotAllowed(HubError):
    """The token is valid but may not do this."""


class PaymentRequired(HubError):
    """What was asked needs a paid plan, or more storage than the account has."""


class TargetExists(HubError):
    """The target repository holds something that is not this push."""


class TargetPublic(HubError):
    """The target repository is there and public, and nobody said that what is uploaded may be."""

    def __init__(self, repo_id: str) -> None:
        super().__init__(
            f"{repo_id} is public: what is uploaded to it is visible to everybody at once. Nothing was uploaded.",
            hint="Say --public if that is meant, make the repository private, or choose another name with --to.",
        )
        self.repo_id = repo_id


class TargetChanged(HubError):
    """Somebody else committed to the target between our look at it and our commit."""

    def __init__(self, repo_id: str, url: str) -> None:
        super().__init__(
            f"Somebody else committed to {repo_id} while it was published; their commit stands, ours was not made.",
            hint=f"Look at {url}/commits/main, then run the same command again: with --update if this is to replace "
            "what is there, or with another name in --to.",
        )
        self.repo_id = repo_id


class TargetGone(HubError):
    """The target repository was there a moment ago, and the Hub finds it no more."""


class CollectionNotFound(HubError):
    """There is no such collection, and what was given is no title to make one of."""


class HubConflict(HubError):
    """The Hub is in the middle of something else with the same repository (409)."""


class RateLimited(HubError):
    """The Hub asks to be left alone for longer than we wait."""


class PublishInterrupted(HubError):
    """The upload did not finish; everything built is still on disk."""


class LicenseUnknown(GradmapError):
    """The base model states no licence, so nothing can be published in its name."""


class CardInvalid(GradmapError):
    """The YAML header of a README.md that was to be published is not one that the Hub would take."""

    def __init__(self, path: str, problems: tuple[str, ...], *, hint: str | None = None) -> None:
        super().__init__(f"The header of {path} is not valid: {problems[0]}. Nothing was uploaded.", hint=hint)
        self.path = path
        self.problems = problems


class UnsafeToPublish(GradmapError):
    """A file that was to be published holds something private, or is of a kind that is never published."""

    def __init__(self, path: str, what: str, *, hint: str) -> None:
        super().__init__(f"{path} {what}. Nothing was uploaded.", hint=hint)
        self.path = path
        self.what = what
