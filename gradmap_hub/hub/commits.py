"""Commits exactly once, on the main branch or in a pull request, even if the answer to the commit is lost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.errors import TargetChanged
from gradmap_hub.hub.client import Hub, RepoState
from gradmap_hub.hub.contents import holds, same_content
from gradmap_hub.hub.failures import status_of, worth_retrying
from gradmap_hub.hub.refusals import CLIENT_ERRORS, refusal, step
from gradmap_hub.hub.transport import HttpFailure
from gradmap_hub.layout import CARD
from gradmap_hub.progress import Reporter

T = TypeVar("T")

_PULL_REQUESTS_READ = 20


@dataclass(frozen=True)
class Committer:
    """Commits to one repository. `kind`: "model" or "space"."""

    hub: Hub
    reporter: Reporter
    repo_id: str
    kind: str

    def commit(
        self,
        additions: list[CommitOperationAdd],
        deletions: list[CommitOperationDelete],
        message: str,
        state: RepoState,
        files: Mapping[str, Path],
    ) -> str:
        """Commit on top of `state.head`.

        Args:
            additions: The files to add.
            deletions: The files to delete.
            message: The commit message.
            state: The repository as it was checked.
            files: All files that the repository holds after the commit: {path in the repository: local file}.

        Returns:
            The id of the commit.

        Raises:
            TargetChanged: somebody else committed after the check.
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited,
                HubError: see `refusals.refusal`.
        """

        def find() -> str | None:
            """The head if it holds the files; None if it is still the head that was checked."""
            now = self.hub.state_once(self.repo_id, self.kind)
            if same_content(files, now.files):
                return now.head
            if now.head != state.head:
                raise TargetChanged(self.repo_id, self.hub.url(self.repo_id, self.kind))
            return None

        def commit() -> str:
            operations = [*map(copy.copy, additions), *deletions]
            return self._create_commit(operations, message, state.head, pull_request=False).oid

        return self._once(commit, find)

    def open_pull_request(
        self,
        additions: list[CommitOperationAdd],
        message: str,
        state: RepoState,
        files: Mapping[str, Path],
        known: Collection[int],
    ) -> tuple[int, str]:
        """Commit in a new pull request.

        Args:
            additions: The files to add.
            message: The commit message, which becomes the title.
            state: The repository as it was checked.
            files: The same files: {path in the repository: local file}.
            known: Numbers of the pull requests that existed before.

        Returns:
            The number of the pull request and the id of its commit.

        Raises:
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited,
                HubError: see `refusals.refusal`.
        """

        def find() -> tuple[int, str] | None:
            for number, head in self._pull_requests().items():
                if number not in known and self._proposes(head, files):
                    return number, head
            return None

        def commit() -> tuple[int, str]:
            made = self._create_commit([*map(copy.copy, additions)], message, state.head, pull_request=True)
            return int(made.pr_num or 0), made.oid

        return self._once(commit, find)

    def pull_requests(self) -> dict[int, str]:
        """The newest 20 pull requests, open or not: {number: commit}.

        Raises:
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited,
                HubError: see `refusals.refusal`.
        """
        return self._read(self._pull_requests)

    def find_open(self, known: Mapping[int, str], files: Mapping[str, Path]) -> tuple[int, str] | None:
        """The open pull request of `known` that proposes these files, as number and commit. A closed one was rejected
        or withdrawn and is ignored.

        Raises:
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited,
                HubError: see `refusals.refusal`.
        """
        open_ = self._read(self._open_numbers) if known else set[int]()
        for number, commit in known.items():
            if number in open_ and self._read(lambda commit=commit: self._proposes(commit, files)):
                return number, commit
        return None

    def _read(self, action: Callable[[], T]) -> T:
        return step(self.hub, "read the pull requests of", self.repo_id, action)

    def _once(self, commit: Callable[[], T], find: Callable[[], T | None]) -> T:
        """Commit exactly once. After a failure that does not tell whether the commit arrived, `find` looks for it
        before the next attempt, and once more before giving up."""
        tried = unsure = False

        def attempt() -> T:
            nonlocal tried, unsure
            if tried and (found := find()) is not None:
                return found
            tried, unsure = True, False
            try:
                return commit()
            except HfHubHTTPError as error:
                unsure = worth_retrying(error) is not None
                if status_of(error) == 412 and (found := find()) is not None:
                    return found
                raise
            except (HttpFailure, OSError, ValueError, KeyError):  # also an answer that the client cannot parse
                unsure = True
                raise

        try:
            return self.hub.attempt(attempt)
        except CLIENT_ERRORS as error:
            known = "Nothing was committed"
            if unsure:
                try:
                    if (found := self.hub.attempt(find, brief=True)) is not None:
                        return found
                except CLIENT_ERRORS:
                    known = "It is unknown whether the commit arrived; the next run checks and commits at most once"
            raise refusal(self.hub.endpoint, "commit to", self.repo_id, known, error) from error

    def _create_commit(
        self,
        operations: list[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str,
        *,
        pull_request: bool,
    ) -> CommitInfo:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = self.hub.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.kind,
                parent_commit=parent,
                create_pr=pull_request,
            )
        for warning in caught:
            if CARD in str(warning.message):  # the Hub's warnings about the card
                self.reporter.note(" ".join(str(warning.message).split()))
        return made

    def _pull_requests(self) -> dict[int, str]:
        refs = self.hub.api.list_repo_refs(self.repo_id, repo_type=self.kind, include_pull_requests=True).pull_requests
        numbered = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs or []}
        return dict(sorted(numbered.items(), reverse=True)[:_PULL_REQUESTS_READ])

    def _open_numbers(self) -> set[int]:
        """The numbers of the pull requests that are neither closed nor merged."""
        listed = self.hub.api.get_repo_discussions(
            self.repo_id, repo_type=self.kind, discussion_type="pull_request", discussion_status="open"
        )
        return {entry.num for entry in listed if entry.status in ("open", "draft")}

    def _proposes(self, commit: str, files: Mapping[str, Path]) -> bool:
        return holds(files, self.hub.state_once(self.repo_id, self.kind, commit).files)
