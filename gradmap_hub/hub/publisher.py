"""Writes to the Hub: a folder becomes one commit, and a failure on the way loses nothing and sends nothing twice.

The steps: read the target, create it private if it does not exist, upload the large files (uploads.py), commit on top
of the head that was read (commits.py), download the result and compare it, change the visibility.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.errors import (
    HubError,
    NotAllowed,
    PaymentRequired,
    PublishInterrupted,
    RepositoryNotFound,
    VerificationError,
)
from gradmap_hub.hub.card_check import CardFacts, check_card
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.commits import Committer
from gradmap_hub.hub.contents import HUB_OWN_FILES, PLACEHOLDERS, holds, same_content
from gradmap_hub.hub.failures import status_of
from gradmap_hub.hub.guard import Guard
from gradmap_hub.hub.refusals import AGAIN, step
from gradmap_hub.hub.screening import Private, screen
from gradmap_hub.hub.target import Terms
from gradmap_hub.hub.uploads import Uploader, size_text
from gradmap_hub.layout import CARD, sha256_of
from gradmap_hub.progress import Reporter, SilentReporter


@dataclass(frozen=True)
class Published:
    """A repository at the commit that holds the files. `uploaded`: whether this run made the commit; `pull_request`:
    URL of the pull request, if the commit is in one instead of on the main branch."""

    repo_id: str
    commit: str
    url: str
    uploaded: bool = field(default=True)
    pull_request: str | None = field(default=None)


class SpaceRefused(HubError):
    """The Hub does not let this account create the Space; the model is unaffected."""


class SpaceNeedsPlan(SpaceRefused):
    """The Space needs a paid plan (402)."""


@dataclass(frozen=True)
class ScreenedFolder:
    """A folder of which every file may be published. Only `Publisher.check` creates one.

    `files`: {path in the repository: local file}; `card`: facts from the header of its README.md.
    """

    folder: Path
    kind: str
    files: dict[str, Path]
    card: CardFacts

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


class Publisher:
    """Writes to the Hub that `hub` reads from."""

    def __init__(self, hub: Hub, reporter: Reporter | None = None) -> None:
        self.reporter = reporter or SilentReporter()
        self.hub = hub if reporter is None else hub.reporting(reporter)
        self.guard = Guard(self.hub)

    def check(
        self,
        folder: Path,
        repo_type: str,
        private: Private,
        *,
        accepted_licenses: Collection[str] = (),
        card: str | None = None,
    ) -> ScreenedFolder:
        """Check every file in `folder` before anything is uploaded.

        Args:
            folder: The folder to upload.
            repo_type: "model" or "space".
            private: What no file may contain.
            accepted_licenses: Licence ids outside our list that the Hub accepts.
            card: The text of the README.md that will be written, if it is not on disk yet.

        Raises:
            UnsafeToPublish: a file is private, or of a type that is not published.
            CardInvalid: the header of README.md is not valid.
        """
        screen(folder, repo_type, private)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        text = card if card is not None else files[CARD].read_text(encoding="utf-8") if CARD in files else ""
        facts = check_card(text, repo_type, shown_as=f"{folder.name}/{CARD}", accepted=accepted_licenses)
        return ScreenedFolder(folder, repo_type, files, facts)

    def publish(
        self,
        screened: ScreenedFolder,
        repo_id: str,
        terms: Terms,
        *,
        message: str,
        variables: Mapping[str, str] | None = None,
        hardware: str | None = None,
        sdk: str = "gradio",
    ) -> Published:
        """Create the repository (private) if needed and add the files in one atomic commit.

        Idempotent: equal content makes no second commit, and bytes that the Hub has are not sent again.

        Args:
            screened: The checked folder.
            repo_id: The repository.
            terms: What the user allows.
            message: The commit message.
            variables: Variables of a Space.
            hardware: Hardware of a new Space; None leaves the choice to the Hub, which takes a CPU.
            sdk: Of a new Space: gradio or static.

        Raises:
            SpaceNeedsPlan: the account's plan does not include a Space on this hardware.
            SpaceRefused: the account may not create the Space.
            TargetExists, TargetPublic: the existing content must not be changed.
            TargetChanged: somebody else committed at the same time.
            PublishInterrupted: the connection broke or the Hub failed; run again to finish.
            NotLoggedIn, NotAllowed, PaymentRequired, HubConflict, RateLimited, HubError
        """
        kind, local = screened.kind, screened.files
        state = self.hub.state(repo_id, kind)
        if state is None:
            self._create(repo_id, kind, variables or {}, hardware, sdk)
            state = self.hub.state(repo_id, kind)
            if state is None:
                raise PublishInterrupted(f"{repo_id} was created but is not visible yet.", hint=AGAIN)
        url = self.hub.url(repo_id, kind)
        if same_content(local, state.files):
            self._set_variables(repo_id, kind, variables or {})
            return self._report(screened, Published(repo_id, state.head, url, uploaded=False))
        deleted: list[str] = []
        if set(state.files) - PLACEHOLDERS[kind]:
            if not terms.update:
                raise self.guard.taken(repo_id, kind, state, terms)
            deleted = self.guard.check_replaceable(repo_id, kind, state, terms, local)
            if deleted:
                self.reporter.note(f"This update removes from {repo_id} (its history keeps them): {_list(deleted)}")
        self.guard.check_visibility(repo_id, state, terms)
        additions = Uploader(self.hub, self.reporter, repo_id, kind, pull_request=False).upload(local)
        self._set_variables(repo_id, kind, variables or {})
        deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in deleted]
        self.reporter.start(_title(kind))
        commit = Committer(self.hub, self.reporter, repo_id, kind).commit(additions, deletions, message, state, local)
        return self._report(screened, Published(repo_id, commit, url))

    def propose(self, screened: ScreenedFolder, repo_id: str, *, message: str) -> Published:
        """Open a pull request with the files in one commit; creates, deletes and publishes nothing else.

        If an open pull request already proposes the same files, it is returned instead.

        Args:
            screened: The checked folder.
            repo_id: The repository of somebody else.
            message: The commit message and title.

        Raises:
            RepositoryNotFound: the repository does not exist.
            PublishInterrupted, NotLoggedIn, NotAllowed, HubConflict, RateLimited, HubError
        """
        kind, local = screened.kind, screened.files
        state = self.hub.state(repo_id, kind)
        if state is None:
            raise RepositoryNotFound(repo_id, hint="A pull request needs an existing repository.")
        url = self.hub.url(repo_id, kind)
        if holds(local, state.files):
            return self._report(screened, Published(repo_id, state.head, url, uploaded=False))
        committer = Committer(self.hub, self.reporter, repo_id, kind)
        known = committer.pull_requests()
        found = committer.find_open(known, local)
        if found is not None:
            number, commit = found
            address = f"{url}/discussions/{number}"
            return self._report(screened, Published(repo_id, commit, url, uploaded=False, pull_request=address))
        additions = Uploader(self.hub, self.reporter, repo_id, kind, pull_request=True).upload(local)
        self.reporter.start(_title(kind, pull_request=True))
        number, commit = committer.open_pull_request(additions, message, state, local, set(known))
        return self._report(screened, Published(repo_id, commit, url, pull_request=f"{url}/discussions/{number}"))

    def verify(self, published: Published, screened: ScreenedFolder) -> int:
        """Download every file at the published commit into a fresh cache and compare sha256; returns the bytes
        compared.

        Raises:
            VerificationError: a file is missing, differs, or was not uploaded.
            RateLimited, HubError
        """
        repo_id, commit, kind = published.repo_id, published.commit, screened.kind
        unverified = f"The files are committed ({commit[:12]}) but not verified; the visibility was not changed"
        state = step(self.hub, "read back", repo_id, lambda: self.hub.state_once(repo_id, kind, commit), unverified)
        missing = set(screened.files) - set(state.files)
        if missing:
            raise _not_verified(published, f"{min(missing)} is missing")
        with tempfile.TemporaryDirectory(prefix="gradmap-verify-") as cache:
            # One cache for all attempts: a finished download is not repeated.
            snapshot = step(
                self.hub,
                "read back",
                repo_id,
                lambda: self.hub.download_once(repo_id, kind, commit, list(screened.files), cache),
                unverified,
            )
            for name, path in screened.files.items():
                copied = snapshot / name
                if not copied.is_file() or sha256_of(copied) != sha256_of(path):
                    raise _not_verified(published, f"{name} differs from the uploaded file")
        surplus = set(state.files) - set(screened.files) - HUB_OWN_FILES
        if surplus and published.pull_request is None:
            raise _not_verified(published, f"{min(surplus)} is not one of the uploaded files")
        return screened.size

    def make_public(self, repo_id: str, repo_type: str) -> None:
        """Make a repository public; the last step of a push.

        Raises:
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, HubConflict, RateLimited, HubError
        """
        step(
            self.hub,
            "make public",
            repo_id,
            lambda: self.hub.api.update_repo_settings(repo_id, repo_type=repo_type, private=False),
            "It is published and verified; its visibility may be unchanged",
        )

    def _report(self, screened: ScreenedFolder, published: Published) -> Published:
        """Finish the stage with the commit; start it first if nothing was uploaded."""
        if not published.uploaded:
            self.reporter.start(_title(screened.kind, pull_request=published.pull_request is not None))
        result = f"{published.repo_id}, {size_text(screened.size)}, commit {published.commit[:12]}"
        if published.pull_request is not None:
            result += f", {published.pull_request}"
        self.reporter.finish(result if published.uploaded else f"{result}, already published")
        return published

    def _create(self, repo_id: str, kind: str, variables: Mapping[str, str], hardware: str | None, sdk: str) -> None:
        space: dict[str, Any] = {}
        if kind == "space":
            entries = [{"key": key, "value": value} for key, value in variables.items()]
            space = {"space_sdk": sdk} | ({"space_variables": entries} if entries else {})
            space |= {"space_hardware": hardware} if hardware else {}

        def create() -> None:
            try:
                self.hub.api.create_repo(repo_id, repo_type=kind, private=True, **space)
            except HfHubHTTPError as error:
                # It exists: the answer to an earlier attempt was lost, or somebody else created it. Its content is
                # checked next, so it does not matter who did.
                if status_of(error) != 409 or self.hub.state(repo_id, kind) is None:
                    raise

        try:
            step(self.hub, "create", repo_id, create, "Nothing was uploaded")
        except (PaymentRequired, NotAllowed) as refused:
            if kind != "space":
                raise
            needs_plan = isinstance(refused, PaymentRequired)
            refusal_type = SpaceNeedsPlan if needs_plan else SpaceRefused
            raise refusal_type(
                f"The Hub does not let this account create the Space {repo_id} (status {402 if needs_plan else 403}).",
                hint=(
                    "A Gradio Space needs a paid plan (PRO, Team, Enterprise), a page for the browser does not: "
                    "--space browser. "
                    if needs_plan
                    else ""
                )
                + "The Space folder is on disk: run it with `gradmap-hub compare FOLDER`, publish it from another "
                "account, or leave it out with --no-space.",
            ) from refused

    def _set_variables(self, repo_id: str, kind: str, variables: Mapping[str, str]) -> None:
        if kind != "space" or not variables:
            return
        api, doing = self.hub.api, "set the variables of"
        present = step(self.hub, doing, repo_id, lambda: api.get_space_variables(repo_id))
        for key, value in variables.items():
            if key not in present or present[key].value != value:
                step(self.hub, doing, repo_id, lambda key=key, value=value: api.add_space_variable(repo_id, key, value))


def _title(kind: str, *, pull_request: bool = False) -> str:
    return f"{'Proposing' if pull_request else 'Publishing'} the {'model' if kind == 'model' else 'Space'}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _not_verified(published: Published, problem: str) -> VerificationError:
    return VerificationError(
        f"{published.repo_id} at {published.commit[:12]}: {problem}.",
        hint="Its visibility was not changed. Look at the commit on the Hub; delete the repository and publish again.",
    )
