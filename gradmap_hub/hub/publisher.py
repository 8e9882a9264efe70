"""Writing to the Hub: a folder becomes one commit, and whatever breaks on the way, nothing is lost, sent twice or
claimed that is not so.

The order is: look at the target, create it private if it is not there, send the large files one by one (the Hub keeps
what it has, also if we stop here), then one commit onto the head that was looked at. When the answer to the commit is
lost, the head tells whether it arrived.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.errors import (
    HubError,
    NotAllowed,
    PaymentRequired,
    PublishInterrupted,
    RepositoryNotFound,
    TargetChanged,
    VerificationError,
)
from gradmap_hub.hub import xet
from gradmap_hub.hub.card_check import CardFacts, check_card
from gradmap_hub.hub.client import Hub, RepoState, status_of, worth_retrying
from gradmap_hub.hub.contents import HUB_OWN_FILES, PLACEHOLDERS, holds, same_content
from gradmap_hub.hub.guard import Guard
from gradmap_hub.hub.refusals import AGAIN, CLIENT_ERRORS, refusal, step
from gradmap_hub.hub.screening import Private, screen
from gradmap_hub.hub.target import Terms
from gradmap_hub.hub.transport import HttpFailure, Watch
from gradmap_hub.layout import CARD, sha256_of
from gradmap_hub.progress import Reporter, SilentReporter

T = TypeVar("T")

# Sent before the commit, one by one and counted. What the Hub stores otherwise goes into the commit itself.
_SENT_FIRST = (".safetensors", ".onnx", ".onnx_data", ".png", ".jpg", ".webp", ".model")
_SENT_FIRST_BYTES = 1_000_000
_PULL_REQUESTS_READ = 20


@dataclass(frozen=True)
class Published:
    """A repository at the commit that was made, or found to hold the same already. `pull_request`: its address, where
    the commit is not on the main branch but proposed."""

    repo_id: str
    commit: str
    url: str
    uploaded: bool = field(default=True)
    pull_request: str | None = field(default=None)


class SpaceRefused(HubError):
    """The Hub does not let this account create the Space; the model is unaffected."""


class SpaceNeedsPlan(SpaceRefused):
    """It would, for a paid plan (402)."""


@dataclass(frozen=True)
class Checked:
    """A folder whose every file may be published, with its card's facts. Only `Publisher.check` makes one."""

    folder: Path
    kind: str
    files: dict[str, Path]
    card: CardFacts

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


class Publisher:
    """Writes to the Hub that `hub` reads."""

    def __init__(self, hub: Hub, reporter: Reporter | None = None) -> None:
        self.reporter = reporter or SilentReporter()
        self.hub = hub.reporting(self.reporter)
        self.guard = Guard(self.hub)

    def check(
        self,
        folder: Path,
        repo_type: str,
        private: Private,
        *,
        accepted_licenses: Collection[str] = (),
        card: str | None = None,
    ) -> Checked:
        """Look through everything in `folder` before any of it leaves the machine. `card`: what README.md will be, if
        that is still to be written.

        Raises:
            UnsafeToPublish, CardInvalid
        """
        screen(folder, repo_type, private)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        text = card if card is not None else files[CARD].read_text(encoding="utf-8") if CARD in files else ""
        facts = check_card(text, repo_type, shown_as=f"{folder.name}/{CARD}", accepted=accepted_licenses)
        return Checked(folder, repo_type, files, facts)

    # -- publishing ------------------------------------------------------------------------------------------------

    def publish(
        self,
        checked: Checked,
        repo_id: str,
        terms: Terms,
        *,
        message: str,
        variables: Mapping[str, str] | None = None,
        hardware: str | None = None,
    ) -> Published:
        """Create the repository (private) if needed and put the files into it with one atomic commit. `hardware`: of a
        Space that is created; None leaves it to the Hub, which takes a CPU.

        Idempotent: equal content makes no second commit, bytes the Hub already has are not sent again.

        Raises:
            SpaceNeedsPlan: the plan of this account does not cover a Space on this hardware.
            SpaceRefused: this account may have no Space there.
            TargetExists, TargetPublic: what is there is not to be touched.
            TargetChanged: somebody else committed at the same time.
            PublishInterrupted: the connection broke or the Hub failed; run again to finish.
            NotLoggedIn, NotAllowed, PaymentRequired, HubConflict, RateLimited, HubError
        """
        kind, local = checked.kind, checked.files
        state = self.hub.state(repo_id, kind)
        if state is None:
            self._create(repo_id, kind, variables or {}, hardware)
            state = self.hub.state(repo_id, kind)
            if state is None:
                raise PublishInterrupted(f"{repo_id} was created and is not to be seen yet.", hint=AGAIN)
        url = self.hub.url(repo_id, kind)
        if same_content(local, state.files):
            self._set_variables(repo_id, kind, variables or {})
            return self._said(checked, Published(repo_id, state.head, url, uploaded=False))
        deleted: list[str] = []
        if set(state.files) - PLACEHOLDERS[kind]:
            if not terms.update:
                raise self.guard.taken(repo_id, kind, state, terms)
            deleted = self.guard.check_replaceable(repo_id, kind, state, terms, local)
            if deleted:
                self.reporter.note(f"Leave {repo_id} with this update (its history keeps them): {_list(deleted)}")
        self.guard.check_visibility(repo_id, state, terms)
        additions = self._upload(repo_id, kind, local, pull_request=False)
        self._set_variables(repo_id, kind, variables or {})
        deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in deleted]
        self.reporter.start(_publishing(kind))
        commit = self._commit(repo_id, kind, additions, deletions, message, state, local)
        return self._said(checked, Published(repo_id, commit, url))

    def propose(self, checked: Checked, repo_id: str, *, message: str) -> Published:
        """Open a pull request with the files in one commit; nothing is created, deleted or made visible.

        An open pull request that proposes the same already is returned instead of opening a second.

        Raises:
            RepositoryNotFound: there is no such repository.
            PublishInterrupted, NotLoggedIn, NotAllowed, HubConflict, RateLimited, HubError
        """
        kind, local = checked.kind, checked.files
        state = self.hub.state(repo_id, kind)
        if state is None:
            raise RepositoryNotFound(repo_id, hint="A pull request needs a repository that exists.")
        url = self.hub.url(repo_id, kind)
        if holds(local, state.files):
            return self._said(checked, Published(repo_id, state.head, url, uploaded=False))
        doing = "read the pull requests of"
        known = step(self.hub, doing, repo_id, lambda: self._pull_requests(repo_id, kind))
        # One that was closed was turned down, or withdrawn: what it proposed is proposed no more.
        open_ = step(self.hub, doing, repo_id, lambda: self._open_numbers(repo_id, kind)) if known else set[int]()
        for number, commit in known.items():
            if number not in open_:
                continue
            if step(self.hub, doing, repo_id, lambda commit=commit: self._proposes(repo_id, kind, commit, local)):
                address = f"{url}/discussions/{number}"
                return self._said(checked, Published(repo_id, commit, url, uploaded=False, pull_request=address))
        additions = self._upload(repo_id, kind, local, pull_request=True)
        self.reporter.start(_publishing(kind, pull_request=True))
        number, commit = self._open(repo_id, kind, additions, message, state, local, set(known))
        return self._said(checked, Published(repo_id, commit, url, pull_request=f"{url}/discussions/{number}"))

    def verify(self, published: Published, checked: Checked) -> int:
        """Download every file at the published commit into a fresh cache and compare sha256; returns the bytes.

        Raises:
            VerificationError: a file is missing, differs, or is there and should not be.
            RateLimited, HubError
        """
        repo_id, commit, kind = published.repo_id, published.commit, checked.kind
        wanted = list(checked.files) if published.pull_request else None  # not all of a repository of others
        unverified = f"It is committed ({commit[:12]}) and not verified; its visibility was not changed"
        with tempfile.TemporaryDirectory(prefix="gradmap-verify-") as cache:
            # The same cache for every try: what has arrived is not fetched again.
            snapshot = Path(
                step(
                    self.hub,
                    "read back",
                    repo_id,
                    lambda: self.hub.api.snapshot_download(
                        repo_id, repo_type=kind, revision=commit, cache_dir=cache, allow_patterns=wanted
                    ),
                    unverified,
                )
            )
            state = step(self.hub, "read back", repo_id, lambda: self.hub.state_once(repo_id, kind, commit), unverified)
            for name, path in checked.files.items():
                copied = snapshot / name
                if not copied.is_file() or sha256_of(copied) != sha256_of(path):
                    raise _not_verified(published, f"{name} is not what was uploaded")
        surplus = set(state.files) - set(checked.files) - HUB_OWN_FILES
        if surplus and published.pull_request is None:
            raise _not_verified(published, f"{min(surplus)} is there and was not uploaded")
        return checked.size

    def make_public(self, repo_id: str, repo_type: str) -> None:
        """Flip visibility; the last thing a push does.

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

    def _said(self, checked: Checked, published: Published) -> Published:
        """Tell the reporter what has come of it."""
        if not published.uploaded:
            self.reporter.start(_publishing(checked.kind, pull_request=published.pull_request is not None))
        words = f"{published.repo_id}, {_size(checked.size)}, commit {published.commit[:12]}"
        if published.pull_request is not None:
            words += f", {published.pull_request}"
        self.reporter.finish(words if published.uploaded else f"{words}, which was there already")
        return published

    # -- steps -----------------------------------------------------------------------------------------------------

    def _create(self, repo_id: str, kind: str, variables: Mapping[str, str], hardware: str | None) -> None:
        space: dict[str, Any] = {}
        if kind == "space":
            entries = [{"key": key, "value": value} for key, value in variables.items()]
            space = {"space_sdk": "gradio", "space_variables": entries}
            space |= {"space_hardware": hardware} if hardware else {}

        def create() -> None:
            try:
                self.hub.api.create_repo(repo_id, repo_type=kind, private=True, **space)
            except HfHubHTTPError as error:
                # There after all: an earlier try of ours whose answer was lost, or somebody was faster. What is in it
                # decides, not who made it.
                if status_of(error) != 409 or self.hub.state(repo_id, kind) is None:
                    raise

        try:
            step(self.hub, "create", repo_id, create, "Nothing was uploaded")
        except (PaymentRequired, NotAllowed) as refused:
            if kind != "space":
                raise
            needs_plan = isinstance(refused, PaymentRequired)
            kind_of = SpaceNeedsPlan if needs_plan else SpaceRefused
            raise kind_of(
                f"The Hub does not let this account create the Space {repo_id} (status {402 if needs_plan else 403}).",
                hint=("A CPU Space needs a paid plan (PRO, Team, Enterprise). " if needs_plan else "")
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

    def _upload(
        self, repo_id: str, kind: str, local: Mapping[str, Path], *, pull_request: bool
    ) -> list[CommitOperationAdd]:
        """Send what the Hub stores apart from the commit. What it has already, also from a run that was stopped, is
        not sent; that is asked for each file, and again before each further try."""
        additions = {name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in local.items()}
        large = [name for name, path in local.items() if _is_sent_first(path)]
        by_xet = bool(large) and step(
            self.hub,
            "upload to",
            repo_id,
            lambda: xet.offered(self.hub, repo_id, kind, pull_request=pull_request),
            "Nothing was committed",
        )
        for name in sorted(large, key=lambda name: local[name].stat().st_size):
            self._upload_one(repo_id, kind, additions[name], pull_request, by_xet)
        rest = [addition for name, addition in additions.items() if name not in large]
        self._preupload(repo_id, kind, rest, pull_request, Watch(lambda _: None))
        return list(additions.values())

    def _upload_one(
        self, repo_id: str, kind: str, addition: CommitOperationAdd, pull_request: bool, by_xet: bool
    ) -> None:
        reporter, size = self.reporter, addition.upload_info.size
        reporter.start(f"Uploading {addition.path_in_repo}")
        reporter.total(size, unit="bytes")
        watch = Watch(reporter.advance)
        self._preupload(repo_id, kind, [addition], pull_request, watch, by_xet=by_xet)
        if watch.by_xet:
            speed = f", {_size(round(watch.sent / max(watch.seconds, 1e-3)))}/s" if watch.sent else ""
            reporter.finish(f"{_size(size)}, of which {_size(watch.sent)} left by xet{speed}")
        elif watch.sent:
            reporter.finish(f"{_size(size)}, {_size(round(watch.sent / max(watch.seconds, 1e-3)))}/s")
        elif watch.asked:
            had = ", which the Hub had already" if watch.stored_before else ""
            reporter.finish(f"{_size(size)}{had}")
        else:
            reporter.finish(f"{_size(size)}, goes with the commit")

    def _preupload(
        self,
        repo_id: str,
        kind: str,
        additions: list[CommitOperationAdd],
        pull_request: bool,
        watch: Watch,
        *,
        by_xet: bool = False,
    ) -> None:
        """`by_xet` is for one file: whether it goes that way if the Hub does not have it."""
        if not additions:
            return

        def send() -> None:
            with ExitStack() as stack:
                new = by_xet and not xet.stored(self.hub, repo_id, kind, additions[0], pull_request=pull_request)
                stack.enter_context(xet.switched(new))
                if new:
                    stack.enter_context(xet.watched(watch, repo_id))
                self.hub.api.preupload_lfs_files(
                    repo_id, additions, repo_type=kind, create_pr=pull_request, free_memory=False, num_threads=1
                )

        step(self.hub, "upload to", repo_id, send, "Nothing was committed", watch=watch)

    def _commit(
        self,
        repo_id: str,
        kind: str,
        additions: list[CommitOperationAdd],
        deletions: list[CommitOperationDelete],
        message: str,
        state: RepoState,
        local: Mapping[str, Path],
    ) -> str:
        """The one commit, onto the head that was looked at; its id, also where its answer was lost."""

        def landed() -> str | None:
            """The head, if it holds what was to be committed; None if nothing has happened since we looked."""
            now = self.hub.state_once(repo_id, kind)
            if same_content(local, now.files):
                return now.head
            if now.head != state.head:
                raise TargetChanged(repo_id, self.hub.url(repo_id, kind))
            return None

        def commit() -> str:
            return self._create_commit(
                repo_id, [*map(copy.copy, additions), *deletions], message, kind, state.head, pull_request=False
            ).oid

        return self._once(repo_id, commit, landed)

    def _open(
        self,
        repo_id: str,
        kind: str,
        additions: list[CommitOperationAdd],
        message: str,
        state: RepoState,
        local: Mapping[str, Path],
        known: Collection[int],
    ) -> tuple[int, str]:
        """The pull request and its commit, also where the answer was lost."""

        def landed() -> tuple[int, str] | None:
            for number, head in self._pull_requests(repo_id, kind).items():
                if number not in known and self._proposes(repo_id, kind, head, local):
                    return number, head
            return None

        def commit() -> tuple[int, str]:
            made = self._create_commit(
                repo_id, [*map(copy.copy, additions)], message, kind, state.head, pull_request=True
            )
            return int(made.pr_num or 0), made.oid

        return self._once(repo_id, commit, landed)

    def _once(self, repo_id: str, commit: Callable[[], T], landed: Callable[[], T | None]) -> T:
        """Commit exactly once. After a failure that leaves it open whether the commit arrived, look before the next
        try, and once more before giving up."""
        tried = unsure = False

        def attempt() -> T:
            nonlocal tried, unsure
            if tried and (found := landed()) is not None:
                return found
            tried, unsure = True, False
            try:
                return commit()
            except HfHubHTTPError as error:
                unsure = worth_retrying(error) is not None
                if status_of(error) == 412 and (found := landed()) is not None:
                    return found
                raise
            except (HttpFailure, OSError, ValueError, KeyError):  # also an answer that the client cannot read
                unsure = True
                raise

        try:
            return self.hub.attempt(attempt)
        except CLIENT_ERRORS as error:
            known = "Nothing was committed"
            if unsure:
                try:
                    if (found := self.hub.attempt(landed, brief=True)) is not None:
                        return found
                except CLIENT_ERRORS:
                    known = "Whether the commit arrived is not known; the next run finds out and commits at most once"
            raise refusal(self.hub.endpoint, "commit to", repo_id, known, error) from error

    def _create_commit(
        self,
        repo_id: str,
        operations: list[CommitOperationAdd | CommitOperationDelete],
        message: str,
        kind: str,
        parent: str,
        *,
        pull_request: bool,
    ) -> CommitInfo:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = self.hub.api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                repo_type=kind,
                parent_commit=parent,
                create_pr=pull_request,
            )
        for warning in said:
            if CARD in str(warning.message):  # the Hub's remarks on the card
                self.reporter.note(" ".join(str(warning.message).split()))
        return made

    def _pull_requests(self, repo_id: str, kind: str) -> dict[int, str]:
        """The newest pull requests: {number: commit}."""
        refs = self.hub.api.list_repo_refs(repo_id, repo_type=kind, include_pull_requests=True).pull_requests or []
        numbered = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs}
        return dict(sorted(numbered.items(), reverse=True)[:_PULL_REQUESTS_READ])

    def _open_numbers(self, repo_id: str, kind: str) -> set[int]:
        """The numbers of the pull requests that are neither closed nor merged."""
        listed = self.hub.api.get_repo_discussions(
            repo_id, repo_type=kind, discussion_type="pull_request", discussion_status="open"
        )
        return {entry.num for entry in listed if entry.status in ("open", "draft")}

    def _proposes(self, repo_id: str, kind: str, commit: str, local: Mapping[str, Path]) -> bool:
        return holds(local, self.hub.state_once(repo_id, kind, commit).files)


def _is_sent_first(path: Path) -> bool:
    return path.suffix in _SENT_FIRST or path.stat().st_size >= _SENT_FIRST_BYTES


def _publishing(kind: str, *, pull_request: bool = False) -> str:
    return f"{'Proposing' if pull_request else 'Publishing'} the {'model' if kind == 'model' else 'Space'}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _not_verified(published: Published, what: str) -> VerificationError:
    return VerificationError(
        f"{published.repo_id} at {published.commit[:12]}: {what}.",
        hint="Its visibility was not changed. Look at the commit on the Hub; delete the repository and publish again.",
    )
