"""Reads from the Hub: wraps the huggingface_hub client, retries transient failures and raises our exceptions.

Only `hub.publisher` writes. The client's own settings (HF_ENDPOINT, HF_TOKEN) choose the Hub, real or embedded.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
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
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    get_session,  # pyright: ignore[reportPrivateImportUsage]
    hf_raise_for_status,  # pyright: ignore[reportPrivateImportUsage]
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from gradmap_hub.errors import (
    CalibrationError,
    GatedRepository,
    HubError,
    NotAllowed,
    NotLoggedIn,
    RepositoryNotFound,
    RevisionNotFound,
    SourceError,
)
from gradmap_hub.errors import UsageError as Usage
from gradmap_hub.hub.accounts import Account, account_of
from gradmap_hub.hub.failures import said_by, status_of, token_refused, unanswered, worth_retrying
from gradmap_hub.hub.headers import read_dtypes
from gradmap_hub.hub.retry import BRIEF, Patience, persist
from gradmap_hub.hub.transport import HttpFailure, Watch, guarded
from gradmap_hub.progress import Reporter, SilentReporter

T = TypeVar("T")

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
class RepoState:
    """A repository at its head. `files`: {path: content id}, the sha256 of LFS files and the git blob id of others.
    `hardware`: that of a Space, the requested one if it differs; `sdk`: of a Space, such as static."""

    head: str
    private: bool
    files: dict[str, str]
    hardware: str | None = None
    sdk: str | None = None


class Hub:
    """A thin, typed wrapper of HfApi. No message shows the token.

    `endpoint`, `token`: by default those of huggingface_hub (HF_ENDPOINT, HF_TOKEN, `hf auth login`). `patience`:
    limits of retries.
    """

    def __init__(
        self, endpoint: str | None = None, token: str | None = None, *, patience: Patience | None = None
    ) -> None:
        # Our reporter shows progress; two progress bars on one terminal garble each other.
        disable_progress_bars()
        # The client's own warnings, such as "token is invalid", would repeat our error messages.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.endpoint = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        if "@" in urlsplit(self.endpoint).netloc:
            raise Usage(
                "HF_ENDPOINT contains a user name or password, which messages and cards would show.",
                hint="Leave it out, and set HF_TOKEN.",
            )
        self.token = token or get_token()
        self.api = HfApi(endpoint=self.endpoint, token=self.token or False)
        self._note = SilentReporter().note
        self.patience = patience or Patience()
        self._brief = patience or BRIEF

    def reporting(self, reporter: Reporter) -> Hub:
        """The same Hub, with notes about waiting sent to `reporter`."""
        other = copy.copy(self)
        other._note = reporter.note
        return other

    def attempt(self, action: Callable[[], T], *, brief: bool = False, watch: Watch | None = None) -> T:
        """Call the client and retry transient failures (see `worth_retrying`); raises the client's last exception.

        Args:
            brief: Retry less, because a user waits for the answer.
            watch: Counts uploaded bytes.
        """

        def once() -> T:
            with guarded(watch):
                return action()

        return persist(once, self._brief if brief else self.patience, worth_retrying, self._note)

    def check_answers(self) -> None:
        """Check that the Hub answers, with a request that needs no token.

        Raises:
            HubError: the Hub cannot be reached, or does not answer.
        """
        try:
            self.attempt(lambda: list(self.api.list_models(author="gradmap-hub", limit=1, token=False)), brief=True)
        except (OSError, HttpFailure) as error:
            raise unanswered(self.endpoint, error) from error

    def account(self) -> Account:
        """The account of the token.

        Raises:
            NotLoggedIn: the token is missing or invalid.
            RateLimited, HubError
        """
        if not self.token:
            raise NotLoggedIn(
                f"Publishing to {self.endpoint} needs a Hugging Face token, and none is set.",
                hint="Run `hf auth login`, or set HF_TOKEN to a token with write access.",
            )
        try:
            answer = self.attempt(self.api.whoami, brief=True)
        except (OSError, HttpFailure) as error:  # OSError: also the client's offline mode
            if status_of(error) in (401, 403):
                raise token_refused(self.endpoint) from error
            raise unanswered(self.endpoint, error) from error
        return account_of(answer)

    def model(self, repo_id: str, revision: str | None) -> RemoteModel:
        """Resolve a model id and revision to a commit, its files and card metadata; checks access to gated weights.

        Raises:
            RepositoryNotFound, RevisionNotFound, GatedRepository, HubError
        """
        if constants.HF_HUB_OFFLINE and (known := _cached(repo_id, revision or "main")) is not None:
            return known
        with self.translated(repo_id, revision):
            info = self.attempt(
                lambda: self.api.model_info(repo_id, revision=revision, files_metadata=True), brief=True
            )
            if info.gated:
                # The metadata of a gated repository is public; only this request tells whether we may read its weights.
                self.attempt(lambda: self.api.auth_check(repo_id), brief=True)
        card = info.card_data.to_dict() if info.card_data else {}
        files = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        return RemoteModel(repo_id, self._commit(repo_id, info.sha), files, card, bool(info.gated), bool(info.private))

    def fetch(self, repo_id: str, commit: str, names: Sequence[str]) -> Path:
        """Download the named files of a model at a commit into the cache; returns the snapshot folder.

        Raises:
            RepositoryNotFound, RevisionNotFound, GatedRepository, SourceError, RateLimited, HubError
        """
        with self.translated(repo_id, commit):
            return self.attempt(lambda: self.download_once(repo_id, "model", commit, names))

    def download_once(
        self, repo_id: str, repo_type: str, commit: str, names: Sequence[str], cache: str | None = None
    ) -> Path:
        """As `fetch`, but without retries and with the client's exceptions: for use within `attempt`. Downloads one
        file after the other, because `attempt` guards the session of this thread only, and `snapshot_download` uses
        threads. `cache`: the cache folder, by default that of huggingface_hub."""
        folder = Path(constants.HF_HUB_CACHE if cache is None else cache)
        for name in names:
            path = self.api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=commit, cache_dir=cache)
            folder = Path(path).parents[name.count("/")]
        return folder

    def tensor_dtypes(self, repo_id: str, commit: str, name: str) -> dict[str, str]:
        """{tensor: dtype, such as "BF16"} from the header of a safetensors file, which is not downloaded. Empty if not
        known: offline, the file is already in the cache, or its header is invalid (see `read_dtypes`).

        Raises:
            As `fetch`.
        """
        with self.translated(repo_id, commit):
            offline = constants.HF_HUB_OFFLINE
            return {} if offline else self.attempt(lambda: read_dtypes(self.api, repo_id, commit, name), brief=True)

    def fetch_dataset_text(self, source: str) -> tuple[list[Path], str]:
        """Download the text files of `owner/name[:config[/split]][@commit]`; returns them and `source@commit`.

        Raises:
            CalibrationError: the data set does not exist, or has no matching .parquet, .jsonl or .txt file.
        """
        source, _, revision = source.partition("@")
        repo_id, _, inside = source.partition(":")

        def download(name: str, commit: str) -> str:
            return self.api.hf_hub_download(repo_id, name, repo_type="dataset", revision=commit)

        try:
            with self.translated(repo_id, revision or None):
                info = self.attempt(lambda: self.api.dataset_info(repo_id, revision=revision or None))
                wanted = _dataset_files([entry.rfilename for entry in info.siblings or []], inside)
                commit = self._commit(repo_id, info.sha)
                paths = [Path(self.attempt(lambda name=name: download(name, commit))) for name in wanted]
        except RepositoryNotFound:
            raise CalibrationError(
                f"The text {source} is neither a local file nor a data set on the Hub.",
                hint="Give --calibration a .txt or .jsonl file, or a Hub dataset as owner/name[:config[/split]].",
            ) from None
        if not paths:
            raise CalibrationError(
                f"The data set {repo_id} has no .parquet, .jsonl or .txt file"
                + (f" under {inside}." if inside else "."),
                hint="Give configuration and split as owner/name:config/split, or a text file.",
            )
        return paths, f"{source}@{commit}"

    def check_license(self, license_id: str) -> None:
        """Ask the Hub whether it accepts a licence id; it rejects a card with an id that it does not know.

        Raises:
            UsageError: the Hub does not accept it.
            RateLimited, HubError
        """
        card = f"---\nlicense: {json.dumps(license_id)}\n---\n"

        def ask() -> int:
            answer = get_session().post(
                f"{self.endpoint}/api/validate-yaml", json={"content": card, "repoType": "model"}
            )
            if answer.status_code != 400:
                hf_raise_for_status(answer)
            return answer.status_code

        try:
            status = self.attempt(ask, brief=True)
        except (OSError, HttpFailure) as error:
            raise unanswered(self.endpoint, error) from error
        if status == 400:
            raise Usage(f"The Hub does not know the licence {license_id!r}; give an id such as apache-2.0, or other.")

    def state(
        self, repo_id: str, repo_type: str, revision: str | None = None, *, brief: bool = False
    ) -> RepoState | None:
        """The repository at its head or at `revision`; None if it does not exist or the token cannot see it. `brief`:
        retry less.

        Raises:
            NotAllowed, NotLoggedIn, RevisionNotFound, RateLimited, HubError
        """
        try:
            with self.translated(repo_id, revision):
                try:
                    return self.attempt(lambda: self.state_once(repo_id, repo_type, revision), brief=brief)
                except HfHubHTTPError as error:
                    if status_of(error) == 403:  # it exists, so we cannot create it
                        raise NotAllowed(
                            f"Your token may not read {repo_id}{said_by(error)}.",
                            hint="Use a token with write access to that namespace, or another name with --to.",
                        ) from error
                    raise
        except RepositoryNotFound:
            return None

    def state_once(self, repo_id: str, repo_type: str, revision: str | None = None) -> RepoState:
        """As `state`, but without retries and with the client's exceptions: for use within `attempt`."""
        info = self.api.repo_info(repo_id, revision=revision, repo_type=repo_type, files_metadata=True)
        commit = self._commit(repo_id, info.sha)
        files = {
            entry.rfilename: entry.lfs.sha256 if entry.lfs else (entry.blob_id or "") for entry in info.siblings or []
        }
        runtime = getattr(info, "runtime", None)
        hardware = (runtime.requested_hardware or runtime.hardware) if runtime is not None else None
        return RepoState(commit, bool(info.private), files, hardware, getattr(info, "sdk", None))

    def _commit(self, repo_id: str, sha: str | None) -> str:
        """Check the commit id of an answer, because it becomes a folder name in the cache.

        Raises:
            HubError: it is missing, or is not a commit id.
        """
        if sha is None or not _COMMIT.fullmatch(sha):
            raise HubError(f"{self.endpoint} returned no commit for {repo_id}.")
        return sha

    def url(self, repo_id: str, repo_type: str) -> str:
        return f"{self.endpoint}/{'spaces/' if repo_type == 'space' else ''}{repo_id}"

    @contextmanager
    def translated(self, repo_id: str, revision: str | None) -> Iterator[None]:
        """Convert the client's exceptions on reading into ours. The order matters: GatedRepoError is a
        RepositoryNotFoundError."""
        try:
            yield
        except HFValidationError as error:
            raise SourceError(
                f"{repo_id!r} is neither a Hub id (org/model) nor a local folder or .gguf file.",
                hint="Check the spelling.",
            ) from error
        except GatedRepoError as error:
            raise GatedRepository(repo_id, self.url(repo_id, "model")) from error
        except RepositoryNotFoundError as error:
            if status_of(error) == 401 and self.token:  # a valid token would give 404
                raise token_refused(self.endpoint) from error
            raise RepositoryNotFound(repo_id) from error
        except RevisionNotFoundError as error:
            raise RevisionNotFound(repo_id, revision or "main") from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise unanswered(self.endpoint, cause) from error
        except EntryNotFoundError as error:
            raise SourceError(f"{repo_id} lists a file that cannot be downloaded.") from error
        except HfHubHTTPError as error:
            status = status_of(error)
            if status == 401 and self.token:
                raise token_refused(self.endpoint) from error
            if status in (401, 403):
                raise RepositoryNotFound(repo_id) from error
            raise unanswered(self.endpoint, error) from error
        except (OSError, HttpFailure) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # the disk, such as a cache that may not be written
            raise unanswered(self.endpoint, error) from error


def _cached(repo_id: str, revision: str) -> RemoteModel | None:
    """A model from the local cache, with the files that were downloaded; None if the cache does not have this revision.
    Without a name in the cache, the only snapshot is taken for `main`. Card, gating and visibility are unknown."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    try:
        commit = folder.joinpath("refs", *revision.split("/")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # none of this name; a name that no file may have
        commit = revision
    if not _COMMIT.fullmatch(commit):
        # Fetched by its commit, as we do, a model has no name in the cache.
        present = [path.name for path in folder.glob("snapshots/*")]
        if revision != "main" or len(present) != 1:
            return None
        commit = present[0]
    snapshot = folder / "snapshots" / commit
    files = {
        path.relative_to(snapshot).as_posix(): path.stat().st_size for path in snapshot.rglob("*") if path.is_file()
    }
    return RemoteModel(repo_id, commit, files, {}, gated=False, private=False) if files else None


def _dataset_files(names: Sequence[str], inside: str) -> list[str]:
    """Files of a configuration and split, sorted: `config/split` matches `config/split*` in any folder."""
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
