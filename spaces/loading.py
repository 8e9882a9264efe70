"""Locate both models and load them in a background thread, so that the page appears at once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compare import Facts, FactsError, Models, Source, Stored
from generation import Model, warm_up
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from prompting import ModelError, first_line

State = Literal["loading", "ready", "error"]

_TOKEN_ADVICE = "Set the secret HF_TOKEN in the Space's settings to a token that can read it, and restart."


@dataclass(frozen=True)
class Status:
    """The state of the models, for the page and the API."""

    state: State
    message: str


def first_precision(facts: Facts) -> str:
    """The precision to load first. PRECISION overrides compare.json, for duplicated Spaces whose model lacks files.

    Raises:
        FactsError: the Space does not have this precision.
    """
    wanted = os.environ.get("PRECISION", "").strip() or facts.precision
    names = [entry.name for entry in facts.precisions]
    if wanted not in names:
        raise FactsError(f"PRECISION is {wanted!r}; this Space has {', '.join(names)}.")
    return wanted


def from_environment(source: Source, stored: Stored, role: str) -> tuple[Source, Stored]:
    """Apply {role}_MODEL, a local folder or a repository, and {role}_REVISION; `role`: ORIGINAL or PRUNED."""
    model = os.environ.get(f"{role}_MODEL", "").strip() or source.repo_id
    revision = os.environ.get(f"{role}_REVISION", "").strip() or None
    if model == source.repo_id:
        found = Source(source.name, source.repo_id, revision or source.revision)
        same = found.revision == source.revision
    else:
        found, same = Source(source.name, model, revision), False
    # The Space stores only the model of compare.json; any other model comes from its repository.
    return found, stored if same or stored.where == "hub" else Stored("hub", "onnx")


def locate(source: Source, stored: Stored, role: str, app_folder: Path, download: Callable[[str], Path]) -> Path:
    """The local folder of a model, downloaded if necessary.

    Raises:
        ModelError: no repository is known, the folder does not exist, or the download fails.
    """
    if stored.where == "space":
        return app_folder / stored.path
    if not source.repo_id:
        raise ModelError(f"its repository is unknown. Set {role}_MODEL to a repository or a local folder.")
    if Path(source.repo_id).is_dir():
        return Path(source.repo_id)
    if source.repo_id.count("/") > 1 or source.repo_id.startswith((".", "/", "~")):
        raise ModelError(f"the folder {source.repo_id} does not exist.")
    return download(source.repo_id)


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status in the chain of causes; huggingface_hub wraps some responses in LocalEntryNotFoundError."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _download(repo_id: str, revision: str | None, files: list[str]) -> Path:
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=files)
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id} is gated and access was refused. Accept its terms on its page. {_TOKEN_ADVICE}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo_id} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{repo_id} does not exist or is private. {_TOKEN_ADVICE}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        status = _http_status(error)
        if status in (401, 403):
            raise ModelError(f"access to {repo_id} was refused. {_TOKEN_ADVICE}") from error
        reason = "the Hub cannot be reached" if status is None else f"the Hub answered {status}"
        raise ModelError(f"{repo_id} could not be downloaded: {reason}.") from error
    except ValueError as error:  # an invalid repository name
        raise ModelError(f"{repo_id!r} is neither a repository nor an existing folder.") from error
    except OSError as error:
        raise ModelError(f"{repo_id} could not be downloaded: {error}") from error
    return Path(folder)


def _give_memory_back() -> None:
    """Free unreferenced memory and return it to the system; glibc would keep it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class Loader:
    """Holds both models in one precision at a time, to limit the memory. Only the current run may request another
    precision."""

    def __init__(self, facts: Facts | None, app_folder: Path, problem: str | None = None) -> None:
        self._facts = facts
        self._folder = app_folder
        self._problem = problem
        self.precision = facts.precision if facts else ""
        if facts is not None:
            try:
                self.precision = first_precision(facts)
            except FactsError as error:
                self._facts, self._problem = None, str(error)
        self.first = self.precision
        self._began = time.monotonic()
        self._doing = ""
        self._models: Models | None = None
        self._closing = False
        self._finished = threading.Event()
        self._thread = self._new_thread()

    def _new_thread(self) -> threading.Thread:
        # A daemon thread, so that a long download does not keep the process alive; see close().
        return threading.Thread(target=self._work, name="model-loading", daemon=True)

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._facts.precisions) if self._facts else ()

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def request(self, precision: str) -> bool:
        """Whether loading has ended for this precision, successfully or not. Otherwise start loading it, unless another
        load is running, and return False."""
        if not self._finished.is_set():
            return False
        if precision == self.precision or self._closing or self._facts is None:
            return True
        self._finished.clear()
        self.precision, self._problem = precision, None
        self._models = None
        _give_memory_back()  # free the old sessions before creating new ones
        self._thread = self._new_thread()
        self.start()
        return False

    def _work(self) -> None:
        try:
            if self._facts is not None and self._problem is None:
                self._models = self._load(self._facts)
        except ModelError as error:
            self._problem = str(error)
        except BaseException as error:  # the page must show every error; a panic in a library is not an Exception
            self._problem = f"The models could not be loaded: {type(error).__name__}: {first_line(error)}"
        finally:
            self._doing = ""
            self._finished.set()

    def _load(self, facts: Facts) -> Models | None:
        # Only one engine and its packages are installed in the Space.
        engine = importlib.import_module(f"{facts.runtime}_engine")
        precision = facts.named(self.precision)
        loaded: list[Model] = []
        for role, source, stored in (
            ("ORIGINAL", facts.original, precision.original),
            ("PRUNED", facts.pruned, precision.pruned),
        ):
            source, stored = from_environment(source, stored, role)
            kind = role.lower()

            def download(
                repo_id: str, kind: str = kind, revision: str | None = source.revision, path: str = stored.path
            ) -> Path:
                self._doing = f" Downloading the {kind}."
                return _download(repo_id, revision, engine.files_to_download(path, precision))

            try:
                folder = locate(source, stored, role, self._folder, download)
                if self._closing:
                    return None
                self._doing = ""
                path = "" if stored.where == "space" else stored.path
                model: Model = engine.load(folder, path, precision)
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
            kind = f" in {self.precision}" if len(self.precisions) > 1 else ""
            return Status("loading", f"Loading the models{kind}\N{HORIZONTAL ELLIPSIS} {seconds} s.{self._doing}")
        if self._models is None:
            return Status("error", self._problem or "The app is shutting down.")
        return Status("ready", "Both models are loaded.")

    def models(self) -> Models:
        """The loaded models.

        Raises:
            ModelError: no models are loaded; the message gives the reason.
        """
        if self._models is None:
            raise ModelError(self.status.message)
        return self._models

    def close(self, seconds: float) -> bool:
        """Wait for the loading thread: ONNX Runtime aborts if Python exits while it creates a session.

        Returns False if the thread is still busy, most likely with a download.
        """
        self._closing = True
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()
