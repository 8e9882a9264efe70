"""All expected failures: one class per cause, with its facts as attributes.

`message` is one line that says what is wrong; `hint`, if any, says what to do next. Neither ever contains a token.
"""

from __future__ import annotations


class GradmapError(Exception):
    """Base class of all expected failures (exit status 1). `message`: one line; `hint`: what to do next, if known."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GradmapError):
    """An invalid argument (exit status 2)."""


class SourceError(GradmapError):
    """The model does not exist, is not a model, or cannot be used; also an unreadable record or compare.json."""


class RepositoryNotFound(SourceError):
    """The Hub has no such repository, or it is private and the token cannot read it."""

    def __init__(self, repo_id: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"There is no model {repo_id} on the Hub that you can access.",
            hint=hint or "Check the spelling; for a private model, log in with `hf auth login` or set HF_TOKEN.",
        )
        self.repo_id = repo_id


class RevisionNotFound(SourceError):
    """The repository exists, but not the branch, tag or commit."""

    def __init__(self, repo_id: str, revision: str) -> None:
        super().__init__(
            f"{repo_id} has no revision {revision!r}.",
            hint="Give a branch, tag or commit of that repository.",
        )
        self.repo_id = repo_id
        self.revision = revision


class GatedRepository(SourceError):
    """The metadata is public, but the token may not read the weights."""

    def __init__(self, repo_id: str, url: str) -> None:
        super().__init__(
            f"Access to the weights of {repo_id} is restricted, and your token has no access.",
            hint=f"Request access at {url}, then run the same command again.",
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
    """Weights that are missing, truncated, or in a format that is never loaded (pickle)."""


class RemoteCodeRefused(SourceError):
    """The model needs Python code from its repository."""


class OutputExists(GradmapError):
    """The output folder is not empty."""


class OutputInUse(GradmapError):
    """Another run works on the output folder."""

    def __init__(self, output: str) -> None:
        super().__init__(
            f"Another run works on {output}.",
            hint="Wait until it ends, or choose another output folder.",
        )


class CalibrationError(GradmapError):
    """The calibration or evaluation text cannot be used."""


class DiskTooSmall(GradmapError):
    """Not enough free disk space for the output."""

    def __init__(self, path: str, needed: int, free: int) -> None:
        super().__init__(
            f"Not enough disk space at {path}: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free.",
            hint="Free some space, or choose another output folder (and HF_HOME for downloads).",
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
    """The separate environment for exports, needed with transformers 5, is missing and cannot be created."""


class VerificationError(GradmapError):
    """The saved model or an export differs from the model in memory. Nothing is published."""


class MemoryNotMeasured(GradmapError):
    """The process whose peak memory is measured died. `reason`: its last line on stderr, or the signal."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"Memory of {backend} was not measured: {reason}")
        self.backend = backend
        self.reason = reason


class SpaceImpossible(GradmapError):
    """No comparison Space is possible, because there are no files of both models that it can run or that fit."""


class BrowserRuntimeMissing(GradmapError):
    """The libraries of the browser Space cannot be fetched from the npm registry."""


class HubError(GradmapError):
    """The Hub refused a request or is unreachable."""


class NotLoggedIn(HubError):
    """There is no token, or the Hub rejects it."""


class NotAllowed(HubError):
    """The token is valid but lacks the permission."""


class PaymentRequired(HubError):
    """The request needs a paid plan, or more storage than the account has."""


class TargetExists(HubError):
    """The target repository has content that this push did not create."""


class TargetPublic(HubError):
    """The target repository is public, and --public was not given."""

    def __init__(self, repo_id: str) -> None:
        super().__init__(
            f"{repo_id} is public: everybody would see the upload at once. Nothing was uploaded.",
            hint="Add --public if you want that, make the repository private, or choose another name with --to.",
        )
        self.repo_id = repo_id


class TargetChanged(HubError):
    """Somebody else committed to the target after it was checked."""

    def __init__(self, repo_id: str, url: str) -> None:
        super().__init__(
            f"Somebody else committed to {repo_id} during the upload; their commit was kept, ours was not made.",
            hint=f"Look at {url}/commits/main, then run the same command again: with --update to replace the content, "
            "or with another name in --to.",
        )
        self.repo_id = repo_id


class TargetGone(HubError):
    """The target repository disappeared during the run."""


class CollectionNotFound(HubError):
    """There is no such collection, and the argument is not a title for a new one."""


class HubConflict(HubError):
    """Another operation on the same repository is in progress (409)."""


class RateLimited(HubError):
    """The Hub requests a longer pause than we wait."""


class PublishInterrupted(HubError):
    """The upload did not finish; all files are still on disk."""


class LicenseUnknown(GradmapError):
    """The base model states no licence, so nothing can be published."""


class CardInvalid(GradmapError):
    """The Hub would reject the YAML header of a README.md."""

    def __init__(self, path: str, problems: tuple[str, ...], *, hint: str | None = None) -> None:
        super().__init__(f"The header of {path} is not valid: {problems[0]}. Nothing was uploaded.", hint=hint)
        self.path = path
        self.problems = problems


class UnsafeToPublish(GradmapError):
    """A file contains something private, or is of a type that is never published."""

    def __init__(self, path: str, what: str, *, hint: str) -> None:
        super().__init__(f"{path} {what}. Nothing was uploaded.", hint=hint)
        self.path = path
        self.what = what
