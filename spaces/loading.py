"""Find the two models and load them in a background thread, so that the page is there at once."""

from __future__ import annotations

import importlib
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from compare import Facts, Models, Source
from generation import Model, warm_up
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from prompting import ModelError

State = Literal["loading", "ready", "error"]

_TOKEN_ADVICE = (
    "Set HF_TOKEN (a secret in the Space's settings) to a token of an account that may read it, and restart."
)


@dataclass(frozen=True)
class Status:
    """What the page and the API say about the models."""

    state: State
    message: str


def from_environment(source: Source, role: str) -> Source:
    """ORIGINAL_MODEL and PRUNED_MODEL name another model: a local folder or a repository."""
    model = os.environ.get(f"{role}_MODEL", "").strip()
    revision = os.environ.get(f"{role}_REVISION", "").strip() or None
    if not model:
        return replace(source, revision=revision or source.revision)
    # A stored original is only the one of compare.json, so another one always comes from elsewhere.
    return replace(source, repo_id=model, revision=revision, stored="hub", path="onnx")


def locate(source: Source, role: str, app_folder: Path, engine: ModuleType) -> tuple[Path, str]:
    """The local folder of a model, downloaded if need be, and the folder of its graph therein."""
    if source.stored == "space":
        return app_folder / source.path, ""
    if not source.repo_id:
        raise ModelError(f"no repository is known for it. Set {role}_MODEL to a repository or to a local folder.")
    if Path(source.repo_id).is_dir():
        return Path(source.repo_id), source.path
    if source.repo_id.count("/") > 1 or source.repo_id.startswith((".", "/", "~")):
        raise ModelError(f"the folder {source.repo_id} does not exist.")
    return _download(source.repo_id, source, engine), source.path


def _http_status(error: BaseException | None) -> int | None:
    """The Hub's answer; huggingface_hub wraps some of them in "not found on this machine"."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _download(repo_id: str, source: Source, engine: ModuleType) -> Path:
    try:
        folder = snapshot_download(
            repo_id, revision=source.revision, allow_patterns=engine.files_to_download(source.path)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id} is gated and access was refused. Accept its terms on its page. {_TOKEN_ADVICE}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo_id} has no revision {source.revision}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{repo_id} does not exist, or is private. {_TOKEN_ADVICE}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        status = _http_status(error)
        if status in (401, 403):
            raise ModelError(f"access to {repo_id} was refused. {_TOKEN_ADVICE}") from error
        reason = "the Hub cannot be reached" if status is None else f"the Hub answered {status}"
        raise ModelError(f"{repo_id} could not be downloaded: {reason}.") from error
    except ValueError as error:  # not a possible repository name
        raise ModelError(f"{repo_id!r} is neither a repository nor an existing folder.") from error
    except OSError as error:
        raise ModelError(f"{repo_id} could not be downloaded: {error}") from error
    return Path(folder)


class Loader:
    """Loads both models once; everybody else asks it for the state."""

    def __init__(self, facts: Facts | None, app_folder: Path, problem: str | None = None) -> None:
        self._facts = facts
        self._folder = app_folder
        self._began = time.monotonic()
        self._doing = ""
        self._problem = problem
        self._models: Models | None = None
        self._closing = False
        self._finished = threading.Event()
        # A daemon, so that a long download does not keep a stopped program alive; see close().
        self._thread = threading.Thread(target=self._work, name="model-loading", daemon=True)

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def _work(self) -> None:
        try:
            if self._facts is not None and self._problem is None:
                self._models = self._load(self._facts)
        except ModelError as error:
            self._problem = str(error)
        except Exception as error:  # the page must say something, whatever it was
            self._problem = f"The models could not be loaded: {type(error).__name__}: {error}"
        finally:
            self._finished.set()

    def _load(self, facts: Facts) -> Models | None:
        # Only one of the engines is deployed, and only that one's packages are installed.
        engine = importlib.import_module(f"{facts.runtime}_engine")
        loaded: list[Model] = []
        for role, source in (("ORIGINAL", facts.original), ("PRUNED", facts.pruned)):
            source = from_environment(source, role)
            kind = role.lower()
            try:
                if source.stored == "hub" and not Path(source.repo_id or "").is_dir():
                    self._doing = f" Downloading the {kind}."
                folder, path = locate(source, role, self._folder, engine)
                if self._closing:
                    return None
                self._doing = ""
                model: Model = engine.load(folder, path, facts.precision)
                warm_up(model)
            except ModelError as error:
                raise ModelError(f"The {kind} model could not be loaded: {error}") from error
            if self._closing:
                return None
            loaded.append(model)
        return Models(*loaded)

    @property
    def status(self) -> Status:
        if not self._finished.is_set():
            seconds = int(time.monotonic() - self._began)
            return Status("loading", f"Loading the models\N{HORIZONTAL ELLIPSIS} {seconds} s.{self._doing}")
        if self._models is None:
            return Status("error", self._problem or "The program is closing.")
        return Status("ready", "Both models are loaded.")

    def wait(self, seconds: float) -> Models:
        """The models, as soon as they are there; in words why not."""
        if not self._finished.wait(seconds):
            raise ModelError(f"The models are still loading after {seconds:.0f} s; try again later.")
        if self._models is None:
            raise ModelError(self.status.message)
        return self._models

    @property
    def models(self) -> Models | None:
        return self._models

    def close(self, seconds: float) -> bool:
        """Wait for the thread: ONNX Runtime aborts when Python ends while it builds a session.

        False if it is still busy, most likely with a download.
        """
        self._closing = True
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()
