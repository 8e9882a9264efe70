"""Resumable work: the result of each stage is on disk and reused while its inputs are unchanged.

Results are small JSON files in a folder next to the output (`OUTPUT.work/`). A stage's key hashes its inputs and the
keys of the stages before it, so that a change recomputes the later stages and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gradmap_hub import distributed
from gradmap_hub.errors import GradmapError
from gradmap_hub.files import read_json
from gradmap_hub.progress import Reporter
from gradmap_hub.reading import from_json
from gradmap_hub.record import to_json

T = TypeVar("T")

# Seconds below which a stage is not worth a garbage collection, which takes a quarter of a second.
_LONG_ENOUGH = 1.0


class Stages:
    """The stages of one run, in order. `folder`: where their results are stored; `identity`: what all of them depend
    on, such as the model; `timings`: the seconds that each stage took when it was computed."""

    def __init__(self, folder: Path, reporter: Reporter, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.reporter = reporter
        self.timings: dict[str, float] = {}
        self._key = _digest(identity)
        self._label = ""
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def key(self) -> str:
        """The hash of the inputs of all stages so far."""
        return self._key

    @property
    def label(self) -> str:
        """The prefix of the titles of the stages."""
        return self._label

    def branch(self, name: str = "", label: str = "") -> Stages:
        """A branch of the stages from here on: its keys do not affect other branches or later stages of this object.
        With a `name`, it has its own results (in a folder of that name) and timings. `label` prefixes the titles."""
        other = copy.copy(self)
        if name:
            other.folder, other.timings = self.folder / name, {}
        other._label = f"{self._label}{label}"
        other.folder.mkdir(parents=True, exist_ok=True)
        return other

    def run(
        self,
        name: str,
        title: str,
        kind: type[T],
        compute: Callable[[], T],
        *,
        inputs: Mapping[str, Any] | None = None,
        files: Callable[[], Sequence[Path]] = lambda: (),
        describe: Callable[[T], str] = lambda _: "",
        together: bool = False,
    ) -> T:
        """Return the stored result of stage `name`, or compute and store it.

        Args:
            title: The title for the reporter.
            kind: The dataclass of the result.
            compute: Computes the result.
            inputs: What the result depends on besides the stages before; must be JSON.
            files: The files that the stage writes; if one is missing or has another size, it is computed again.
            describe: A note on the result for the reporter.
            together: Of several processes, all compute; by default only the main one. All return the main one's result.

        Raises:
            GradmapError: the stored result is damaged, or the main process stored none.
        """
        self._key = _digest({"before": self._key, "stage": name, "inputs": dict(inputs or {})})
        self.reporter.start(f"{self._label}{title}")
        stored = self._stored(name, files)
        distributed.wait()  # before anything is written: all processes find the same
        if stored is None and not distributed.is_main():
            if together:
                compute()
            distributed.wait()
            stored = self._stored(name, files)
            if stored is None:
                raise GradmapError(
                    f"The main process wrote no {name}.json that this one can read in {self.folder}.",
                    hint="All processes need the same folder, on one machine or on a shared disk.",
                )
        if stored is not None:
            try:
                result = from_json(kind, stored["result"])
            except ValueError as error:
                raise GradmapError(
                    f"{self.folder / name}.json is damaged: {error}.",
                    hint="Delete it, then run the same command again.",
                ) from error
            self.timings[name] = stored["seconds"]
            self.reporter.finish(describe(result), reused=True)
            return result
        # Deleted before the files change: after an interruption, an older result must not seem to describe them.
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        started = time.monotonic()
        result = compute()
        seconds = round(time.monotonic() - started, 2)
        self.timings[name] = seconds
        text = json.dumps(
            {
                "key": self._key,
                "seconds": seconds,
                "files": _sizes(files()),
                "result": json.loads(to_json(result)),
            }
        )
        partial = self.folder / f"{name}.json.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / f"{name}.json")  # atomic: a stage is never half done
        distributed.wait()
        self.reporter.finish(describe(result))
        if seconds >= _LONG_ENOUGH:
            _give_memory_back()
        return result

    def _stored(self, name: str, files: Callable[[], Sequence[Path]]) -> dict[str, Any] | None:
        """The stored result, if the files of the stage exist and have the stored sizes."""
        stored = self._read(name)
        return stored if stored is not None and stored["files"] == _sizes(files()) else None

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            stored = read_json(self.folder / f"{name}.json")
        except (FileNotFoundError, ValueError):
            return None
        ours = isinstance(stored, dict) and stored.get("key") == self._key
        return stored if ours and {"result", "files", "seconds"} <= stored.keys() else None


def _sizes(paths: Sequence[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size if path.is_file() else -1 for path in paths}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _give_memory_back() -> None:
    """Return freed memory to the operating system. glibc would keep it, and the next stage may be a child process (the
    ONNX export) that needs it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc; Windows has no CDLL(None)
        ctypes.CDLL(None).malloc_trim(0)
