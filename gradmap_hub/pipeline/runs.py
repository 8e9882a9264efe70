"""`list` and `clean`: find the runs below a folder by their records, and delete the work folders that they leave."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradmap_hub.errors import OutputInUse, SourceError, UsageError
from gradmap_hub.layout import work_folder
from gradmap_hub.pipeline.run import exclusive
from gradmap_hub.record import FILE_NAME, RunRecord

# Levels of folders that are searched below the given one. Results are rarely deeper, and a home folder has many levels.
DEPTH = 3
_WORK = ".work"
# A work folder has at least one of these files; another folder whose name ends with .work has none.
_STAGES = ("pull.json", "write.json", "score.json", "lock", "heal", "self-text.json", "evaluate-memory.json")
_HEALING = "heal"


@dataclass(frozen=True)
class Found:
    """A run.

    `record`: None if the run did not finish or its record cannot be read; `problem` says which. `bytes`: size of the
    result. `work`: its work folder, or None; `work_bytes`: size of that; `healing`: whether it holds the state of a
    healing that did not finish.
    """

    folder: Path
    record: RunRecord | None
    problem: str
    bytes: int
    work: Path | None
    work_bytes: int
    healing: bool = False

    @property
    def finished(self) -> bool:
        return self.record is not None and not self.healing


def find_runs(root: Path) -> list[Found]:
    """The runs in `root` and in the folders below it, sorted by path. Links are not followed.

    Raises:
        UsageError: there is no such folder.
    """
    if not root.is_dir():
        raise UsageError(f"There is no folder {root}.")
    return sorted(_runs(root, DEPTH), key=lambda run: run.folder)


def _runs(folder: Path, depth: int) -> Iterator[Found]:
    if (folder / FILE_NAME).is_file():
        yield _run(folder)
        return
    try:
        inside = sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        return
    for path in inside:
        if is_work_folder(path):
            output = path.with_name(path.name.removesuffix(_WORK))
            if not (output / FILE_NAME).is_file():  # did not finish
                yield Found(output, None, "not finished", _size(output), path, _size(path))
        elif depth and not path.name.startswith("."):
            yield from _runs(path, depth - 1)


def is_work_folder(path: Path) -> bool:
    """Whether this is the work folder of a run."""
    return path.name.endswith(_WORK) and any((path / name).exists() for name in _STAGES)


def _run(folder: Path) -> Found:
    record, problem = None, ""
    try:
        record = RunRecord.read(folder)
    except SourceError as error:
        problem = error.message
    work = work_folder(folder)
    there = is_work_folder(work)
    if not there:
        return Found(folder, record, problem, _size(folder), None, 0)
    return Found(folder, record, problem, _size(folder), work, _size(work), (work / _HEALING).exists())


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; links are ignored."""
    return sum(
        entry.stat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink()
    )  # 0 if there is no such folder


def remove_work(runs: Sequence[Found]) -> Iterator[tuple[Found, str]]:
    """Delete the work folder of each run. Yields each run that has one, with the reason why it was kept, or ""."""
    for run in runs:
        if run.work is None:
            continue
        try:
            with exclusive(run.folder):
                shutil.rmtree(run.work)
        except OutputInUse as error:
            yield run, error.message
        except OSError as error:
            yield run, str(error.strerror or error)
        else:
            yield run, ""
