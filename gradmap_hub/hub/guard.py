"""Checks whether a target may be written to: its name, the token, its content."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]

from gradmap_hub.errors import NotAllowed, RepositoryNotFound, TargetExists, TargetPublic, UsageError
from gradmap_hub.hub.accounts import Account, check_owner, check_scopes
from gradmap_hub.hub.client import Hub, RepoState
from gradmap_hub.hub.contents import HUB_OWN_FILES, PLACEHOLDERS
from gradmap_hub.hub.target import Mark, Terms, is_ours


class Guard:
    """Checks targets without changing them."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def check_target(
        self,
        repo_id: str,
        account: Account,
        repo_type: str,
        terms: Terms,
        *,
        resuming: bool = False,
        pull_request: bool = False,
    ) -> str:
        """Check before any work that we may write to a repository; returns a description of its state.

        Args:
            repo_id: The repository.
            account: The account of the token.
            repo_type: "model" or "space".
            terms: What the user allows.
            resuming: The repository may already hold the commit of this push; `Publisher.publish` compares the content.
            pull_request: The files go to a pull request.

        Raises:
            UsageError: `repo_id` is not a valid name of a repository.
            NotAllowed: the token cannot write, or not to this namespace.
            RepositoryNotFound: a pull request to a repository that does not exist.
            TargetExists: the repository already holds files.
            TargetPublic: the repository is public, without --public.
        """
        owner = check_name(repo_id)
        if account.role == "read":
            raise NotAllowed("Your token is read-only.", hint="Create one with write access and set HF_TOKEN to it.")
        if not pull_request:
            check_owner(repo_id, owner, account)
        state = self.hub.state(repo_id, repo_type, brief=True)
        check_scopes(repo_id, owner, account, repo_type, exists=state is not None, pull_request=pull_request)
        if pull_request:
            if state is None:
                raise RepositoryNotFound(repo_id, hint="A pull request needs an existing repository.")
            return f"{repo_id} gets a pull request; nothing else in it changes"
        if state is None:
            return f"{repo_id} does not exist yet; it is created private"
        visibility = "private" if state.private else "public"
        count = len(set(state.files) - HUB_OWN_FILES)
        if not set(state.files) - PLACEHOLDERS[repo_type]:
            self.check_visibility(repo_id, state, terms)
            return f"{repo_id} exists, empty and {visibility}"
        if terms.update:
            self.check_replaceable(repo_id, repo_type, state, terms, ())
            self.check_visibility(repo_id, state, terms)
            return f"{repo_id} holds an earlier push of {count} files, {visibility}; one commit replaces it"
        if not resuming:
            raise self.taken(repo_id, repo_type, state, terms)
        return f"{repo_id} holds {count} files, {visibility}; the push continues only if they equal its own"

    def check_visibility(self, repo_id: str, state: RepoState, terms: Terms) -> None:
        """Check that the upload is not visible at once against the user's will.

        Raises:
            TargetPublic: the repository is public, without --public.
        """
        if not state.private and not terms.public:
            raise TargetPublic(repo_id)

    def _is_earlier(self, repo_id: str, kind: str, state: RepoState, mark: Mark | None) -> bool:
        if mark is None or mark.file not in state.files:
            return False
        with tempfile.TemporaryDirectory(prefix="gradmap-mark-") as cache, self.hub.translated(repo_id, state.head):
            path = self.hub.attempt(
                lambda: self.hub.api.hf_hub_download(
                    repo_id, mark.file, repo_type=kind, revision=state.head, cache_dir=cache
                )
            )
            return mark.fits(Path(path).read_bytes())

    def taken(self, repo_id: str, kind: str, state: RepoState, terms: Terms) -> TargetExists:
        """The error for a repository with content; its hint names --update if that would help."""
        if self._is_earlier(repo_id, kind, state, terms.mark):
            hint = "It is an earlier push of the same model: replace it with --update, or choose another --to."
        else:
            hint = "Choose another name with --to, or continue an interrupted push with --resume."
        count = len(set(state.files) - HUB_OWN_FILES)
        return TargetExists(
            f"{repo_id} already exists and is not empty ({count} files); it was not changed.", hint=hint
        )

    def check_replaceable(
        self, repo_id: str, kind: str, state: RepoState, terms: Terms, local: Collection[str]
    ) -> list[str]:
        """The files of the repository that an update to the files `local` removes.

        Raises:
            TargetExists: the repository is not an earlier push of the same model, or holds files of others.
        """
        if not self._is_earlier(repo_id, kind, state, terms.mark):
            raise TargetExists(
                f"{repo_id} does not hold an earlier push of the same model; it was not changed.",
                hint="--update replaces only an earlier push of the same original to the same name. Choose another "
                "name with --to.",
            )
        removed = sorted(set(state.files) - set(local) - HUB_OWN_FILES)
        foreign = [name for name in removed if not is_ours(name, kind)]
        if foreign:
            raise TargetExists(
                f"{repo_id} holds {foreign[0]}, which is not from gradmap-hub; the repository was not changed.",
                hint="Remove that file on the Hub and run the same command again, or choose another name with --to.",
            )
        return removed


def check_name(repo_id: str) -> str:
    """Check a repository id OWNER/NAME; returns the owner.

    Raises:
        UsageError: `repo_id` is not a valid name of a repository.
    """
    owner, _, name = repo_id.partition("/")
    if not owner or not name or "/" in name:
        raise UsageError(f"--to takes OWNER/NAME; got {repo_id!r}.")
    try:
        validate_repo_id(repo_id)
        good = repo_id.isascii()  # the client takes letters of any script, the Hub does not
    except HFValidationError:
        good = False
    if not good:
        raise UsageError(
            f"{repo_id!r} is not a valid name of a repository: use at most 96 letters (a-z, A-Z), digits, '-', '_' "
            "and '.'."
        )
    return owner
