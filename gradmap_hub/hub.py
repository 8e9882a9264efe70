"""The only module that talks to the Hub: the huggingface_hub client, with its failures turned into ours.

Which Hub is decided by the client's own settings (HF_ENDPOINT, HF_TOKEN); nothing here knows whether it is the real
one or the embedded one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils.tqdm import disable_progress_bars
from requests import RequestException

from gradmap_hub.errors import (
    CalibrationError,
    GatedRepository,
    HubError,
    NotAllowed,
    NotLoggedIn,
    PublishInterrupted,
    RepositoryNotFound,
    RevisionNotFound,
    SourceError,
    TargetExists,
    VerificationError,
)
from gradmap_hub.errors import UsageError as Usage
from gradmap_hub.source import sha256_of

# Files the Hub itself puts into a new repository, and edits on its own.
_HUB_OWN_FILES = {".gitattributes"}
# A new Space also starts with a README that says so; one that holds nothing else has never had an app.
_PLACEHOLDERS = {"model": _HUB_OWN_FILES, "space": _HUB_OWN_FILES | {"README.md"}}


@dataclass(frozen=True)
class Account:
    """Who a token belongs to."""

    name: str
    organizations: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class RemoteModel:
    """A model repository at one commit. `files`: {path: bytes}."""

    repo_id: str
    commit: str
    files: dict[str, int]
    card: dict[str, Any]
    gated: bool
    private: bool


@dataclass(frozen=True)
class Published:
    """A repository at the commit that was verified."""

    repo_id: str
    commit: str
    url: str
    uploaded: bool = field(default=True)


class SpaceRefused(HubError):
    """The Hub does not let this account create the Space; the model is unaffected."""


class Hub:
    """A thin, typed front of HfApi. The token is held by the client and never shown."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        # Ours report progress; two progress displays on one terminal destroy each other.
        disable_progress_bars()
        # The client's own "token is invalid" hints would repeat what we say in one line.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.endpoint = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self._token = token or get_token()
        self._api = HfApi(endpoint=self.endpoint, token=self._token or False)

    # -- reading ---------------------------------------------------------------------------------------------------

    def account(self) -> Account:
        """Whose token this is.

        Raises:
            NotLoggedIn: no token, or not a valid one.
        """
        if not self._token:
            raise NotLoggedIn(
                f"Publishing needs a Hugging Face token, and there is none for {self.endpoint}.",
                hint="Run `hf auth login`, or set HF_TOKEN to a token with write access.",
            )
        try:
            answer = self._api.whoami()
        except OSError as error:  # what requests and the client raise, and the client's offline mode
            if _status(error) in (401, 403):
                raise _token_refused(self.endpoint) from error
            raise _unreachable(self.endpoint, error) from error
        role = answer.get("auth", {}).get("accessToken", {}).get("role", "")
        organizations = tuple(entry["name"] for entry in answer.get("orgs", []))
        return Account(answer["name"], organizations, role)

    def model(self, repo_id: str, revision: str | None) -> RemoteModel:
        """Resolve a model id and revision to a commit, its files and its card metadata; weights access is checked.

        Raises:
            RepositoryNotFound, RevisionNotFound, GatedRepository, HubError
        """
        with self._translated(repo_id, revision):
            info = self._api.model_info(repo_id, revision=revision, files_metadata=True)
            if info.gated:
                # Metadata of a gated repository is public: only this tells whether its weights are ours to read.
                self._api.auth_check(repo_id)
        card = info.card_data.to_dict() if info.card_data else {}
        files = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        if info.sha is None:
            raise HubError(f"{self.endpoint} did not say at which commit {repo_id} is.")
        return RemoteModel(repo_id, info.sha, files, card, bool(info.gated), bool(info.private))

    def fetch(self, repo_id: str, commit: str, names: Sequence[str]) -> Path:
        """Download the named files of a model at a commit into the cache; returns the snapshot folder."""
        with self._translated(repo_id, commit):
            folder = self._api.snapshot_download(repo_id, revision=commit, allow_patterns=list(names))
        return Path(folder)

    def fetch_dataset_text(self, source: str) -> tuple[list[Path], str]:
        """Download the text files of `owner/name[:config[/split]]`; returns them and `source@commit`.

        Raises:
            CalibrationError: no such data set, or no .parquet, .jsonl or .txt file in it that fits.
        """
        repo_id, _, inside = source.partition(":")
        try:
            with self._translated(repo_id, None):
                info = self._api.dataset_info(repo_id)
                wanted = _dataset_files([entry.rfilename for entry in info.siblings or []], inside)
                paths = [
                    Path(self._api.hf_hub_download(repo_id, name, repo_type="dataset", revision=info.sha))
                    for name in wanted
                ]
        except RepositoryNotFound:
            raise CalibrationError(
                f"There is no text {source}: neither a file here nor a data set on the Hub.",
                hint="Give --calibration a .txt or .jsonl file, or a Hub dataset as owner/name[:config[/split]].",
            ) from None
        if not paths:
            raise CalibrationError(
                f"The data set {repo_id} has no .parquet, .jsonl or .txt file"
                + (f" under {inside}." if inside else "."),
                hint="Name configuration and split as owner/name:config/split, or give a text file.",
            )
        return paths, f"{source}@{info.sha}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def check_target(self, repo_id: str, account: Account, repo_type: str = "model", *, resuming: bool = False) -> None:
        """Refuse, before any work, a target that cannot be ours. A resumed push may find its own commit there;
        `publish` compares the content.

        Raises:
            NotAllowed: read-only token or a foreign namespace.
            TargetExists: the repository already holds files.
        """
        owner, _, name = repo_id.partition("/")
        if not owner or not name or "/" in name:
            raise Usage(f"--to takes OWNER/NAME; got {repo_id!r}.")
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise Usage(
                f"{repo_id!r} cannot be the name of a repository: letters, digits, '-', '_' and '.' only, 96 at most."
            ) from error
        if account.role == "read":
            raise NotAllowed("Your token may only read.", hint="Make one with write access and set HF_TOKEN to it.")
        if owner != account.name and owner not in account.organizations:
            raise NotAllowed(
                f"You are {account.name} and may not write to {owner}.",
                hint=f"Use --to {account.name}/{name}, or ask for membership of {owner}.",
            )
        existing = self.remote_files(repo_id, repo_type)
        if existing is not None and set(existing) - _PLACEHOLDERS[repo_type] and not resuming:
            raise TargetExists(
                f"{repo_id} already exists and is not empty ({len(existing)} files); it is left as it is.",
                hint="Choose another name with --to, or finish an interrupted push of it with --resume.",
            )

    def check_license(self, license_id: str) -> None:
        """Ask the Hub, which keeps the list of licence ids, before any work: it refuses a card with another.

        Raises:
            UsageError: the Hub does not know it.
        """
        card = f"---\nlicense: {json.dumps(license_id)}\n---\n"
        try:
            answer = get_session().post(
                f"{self.endpoint}/api/validate-yaml", json={"content": card, "repoType": "model"}, timeout=30
            )
        except OSError as error:
            raise _unreachable(self.endpoint, error) from error
        if answer.status_code == 400:
            raise Usage(f"The Hub knows no licence {license_id!r}; give its id, such as apache-2.0, or other.")

    def remote_files(self, repo_id: str, repo_type: str, revision: str | None = None) -> dict[str, str] | None:
        """{path: content id} of a repository (sha256 for LFS, git blob id otherwise), or None if there is none."""
        try:
            with self._translated(repo_id, revision):
                info = self._api.repo_info(repo_id, revision=revision, repo_type=repo_type, files_metadata=True)
        except RepositoryNotFound:
            return None
        return {
            entry.rfilename: entry.lfs.sha256 if entry.lfs else (entry.blob_id or "") for entry in info.siblings or []
        }

    def publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        repo_type: str,
        message: str,
        variables: Mapping[str, str] | None = None,
    ) -> Published:
        """Create the repository (private) if needed and put the folder's files into it with one atomic commit.

        Idempotent: equal content makes no second commit, bytes the Hub already has are not sent again.

        Raises:
            SpaceRefused: the plan of this account does not cover a Space.
            TargetExists: the repository holds other content.
            PublishInterrupted: the connection broke or the Hub failed; run again to finish.
        """
        local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        remote = self.remote_files(repo_id, repo_type)
        if remote is None:
            self._create(repo_id, repo_type, variables or {})
            remote = self.remote_files(repo_id, repo_type) or {}
        elif repo_type == "space" and variables:
            self._set_variables(repo_id, variables)
        foreign = set(remote) - _PLACEHOLDERS[repo_type]
        url = self.url(repo_id, repo_type)
        if foreign:
            if _same_content(local, remote):
                return Published(repo_id, self._head(repo_id, repo_type), url, uploaded=False)
            raise TargetExists(
                f"{repo_id} already holds other content; it is left as it is.",
                hint="Choose another name with --to.",
            )
        head = self._head(repo_id, repo_type)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in local.items()]
        try:
            commit = self._api.create_commit(
                repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=head
            )
        except (HfHubHTTPError, RequestException, RuntimeError, OSError) as error:
            landed = self._landed(repo_id, repo_type, local)
            if landed is not None:  # the answer was lost, not the commit
                return Published(repo_id, landed, url)
            raise _interrupted(repo_id, self.endpoint, error) from error
        except ValueError as error:  # the Hub's judgement of README.md, or of a file
            raise HubError(
                f"The Hub refuses what was to be published to {repo_id}: {' '.join(str(error).split())[:300]}",
                hint="Nothing was committed; what was built is on disk.",
            ) from error
        return Published(repo_id, commit.oid, url)

    def verify(self, published: Published, folder: Path, *, repo_type: str) -> int:
        """Download every file at the published commit into a fresh cache and compare sha256; returns the bytes.

        Raises:
            VerificationError: a file is missing or differs.
        """
        total = 0
        with tempfile.TemporaryDirectory(prefix="gradmap-verify-") as cache:
            with self._translated(published.repo_id, published.commit):
                snapshot = Path(
                    self._api.snapshot_download(
                        published.repo_id, repo_type=repo_type, revision=published.commit, cache_dir=cache
                    )
                )
            for path in sorted(folder.rglob("*")):
                if not path.is_file():
                    continue
                name = path.relative_to(folder)
                copy = snapshot / name
                if not copy.is_file() or sha256_of(copy) != sha256_of(path):
                    raise VerificationError(
                        f"{published.repo_id} at {published.commit[:12]}: {name} is not what was uploaded.",
                        hint="The repository stays private. Delete it and publish again.",
                    )
                total += path.stat().st_size
        return total

    def make_public(self, repo_id: str, repo_type: str) -> None:
        """Flip visibility; the last thing a push does."""
        with self._translated(repo_id, None):
            self._api.update_repo_settings(repo_id, repo_type=repo_type, private=False)

    def url(self, repo_id: str, repo_type: str) -> str:
        return f"{self.endpoint}/{'spaces/' if repo_type == 'space' else ''}{repo_id}"

    def _create(self, repo_id: str, repo_type: str, variables: Mapping[str, str]) -> None:
        space: dict[str, Any] = {}
        if repo_type == "space":
            entries = [{"key": key, "value": value} for key, value in variables.items()]
            space = {"space_sdk": "gradio", "space_variables": entries}
        try:
            self._api.create_repo(repo_id, repo_type=repo_type, private=True, exist_ok=True, **space)
        except HfHubHTTPError as error:
            status = _status(error)
            if repo_type == "space" and status in (402, 403):
                raise SpaceRefused(
                    f"The Hub does not let this account create the Space {repo_id} (status {status}).",
                    hint="A CPU Space needs a paid plan (PRO, Team, Enterprise). The Space folder is on disk: "
                    "run it with `gradmap-hub compare FOLDER`, or upload it from an account with a plan.",
                ) from error
            if status == 403:
                raise NotAllowed(
                    f"Your token may not create {repo_id}.",
                    hint="Use a token with write access to that namespace.",
                ) from error
            raise _interrupted(repo_id, self.endpoint, error) from error
        except RequestException as error:
            raise _interrupted(repo_id, self.endpoint, error) from error

    def _set_variables(self, repo_id: str, variables: Mapping[str, str]) -> None:
        with self._translated(repo_id, None):
            present = self._api.get_space_variables(repo_id)
            for key, value in variables.items():
                if key not in present or present[key].value != value:
                    self._api.add_space_variable(repo_id, key, value)

    def _head(self, repo_id: str, repo_type: str) -> str:
        with self._translated(repo_id, None):
            sha = self._api.repo_info(repo_id, repo_type=repo_type).sha
        return sha or ""

    def _landed(self, repo_id: str, repo_type: str, local: Mapping[str, Path]) -> str | None:
        try:
            remote = self.remote_files(repo_id, repo_type)
            if remote and _same_content(local, remote):
                return self._head(repo_id, repo_type)
        except (HubError, SourceError):
            pass
        return None

    @contextmanager
    def _translated(self, repo_id: str, revision: str | None) -> Iterator[None]:
        """Turn the client's exceptions into ours. Order matters: gated is a kind of not-found there."""
        try:
            yield
        except HFValidationError as error:
            raise SourceError(
                f"{repo_id!r} is neither a Hub id (org/model) nor a folder or .gguf file here.",
                hint="Check the spelling.",
            ) from error
        except GatedRepoError as error:
            raise GatedRepository(repo_id, self.url(repo_id, "model")) from error
        except RepositoryNotFoundError as error:
            if _status(error) == 401 and self._token:  # with a valid token it would be 404
                raise _token_refused(self.endpoint) from error
            raise RepositoryNotFound(repo_id) from error
        except RevisionNotFoundError as error:
            raise RevisionNotFound(repo_id, revision or "main") from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            cause = error.__cause__ if error.__cause__ is not None else error
            raise _unreachable(self.endpoint, cause) from error
        except EntryNotFoundError as error:
            raise SourceError(f"{repo_id} lacks a file that its listing names.") from error
        except HfHubHTTPError as error:
            status = _status(error)
            if status == 401 and self._token:
                raise _token_refused(self.endpoint) from error
            if status in (401, 403):
                raise RepositoryNotFound(repo_id) from error
            raise _unreachable(self.endpoint, error) from error
        except (RequestException, OSError) as error:
            raise _unreachable(self.endpoint, error) from error


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _same_content(local: Mapping[str, Path], remote: Mapping[str, str]) -> bool:
    if set(local) != set(remote) - (_HUB_OWN_FILES - set(local)):
        return False
    return all(
        remote[name] == (sha256_of(path) if len(remote[name]) == 64 else _git_blob_id(path))
        for name, path in local.items()
    )


def _dataset_files(names: Sequence[str], inside: str) -> list[str]:
    """Files of a configuration and split: `config/split` matches the path `config/split*`, in any folder."""
    config, _, split = inside.partition("/")
    found = []
    for name in sorted(names):
        if not name.endswith((".parquet", ".jsonl", ".txt")):
            continue
        folder, _, file = name.rpartition("/")
        if config and config not in folder.split("/"):
            continue
        if split and not file.startswith(split):
            continue
        found.append(name)
    return found


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _token_refused(endpoint: str) -> NotLoggedIn:
    return NotLoggedIn(
        f"{endpoint} does not accept your token.",
        hint="Make a new one with write access and run `hf auth login` or set HF_TOKEN.",
    )


def _status_line(error: BaseException) -> str:
    """One short line about a failed request, without its URL's query or headers."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"status {response.status_code}"
    return type(error).__name__


def _unreachable(endpoint: str, error: BaseException) -> HubError:
    return HubError(
        f"The Hub at {endpoint} did not answer as expected ({_status_line(error)}).",
        hint="Check the connection (and HF_ENDPOINT), then run the same command again.",
    )


def _interrupted(repo_id: str, endpoint: str, error: BaseException) -> PublishInterrupted:
    return PublishInterrupted(
        f"The upload to {repo_id} at {endpoint} did not finish ({_status_line(error)}). Nothing was committed; "
        "what was built is on disk.",
        hint="Run the same command again (push: with --resume); what the Hub already has is not sent again.",
    )
