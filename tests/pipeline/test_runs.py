"""`list` and `clean`, on folders of the form that runs leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradmap_hub.cli.app import app
from gradmap_hub.errors import UsageError
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.pipeline.run import exclusive
from gradmap_hub.pipeline.runs import DEPTH, find_runs
from gradmap_hub.record import Base, CalibrationRecord, CompensationRecord, LayerDecision, RunRecord

RECORD = RunRecord(
    schema_version=1, gradmap_hub="0.1", command="gradmap-hub prune acme/base", name="small",
    base=Base("acme/base", "acme/base", "main", "c" * 40, "mit"),
    layers=[LayerDecision(index, 1.0, index != 1, "") for index in range(3)], removed=[1], ratio=1 / 3,
    parameters=BeforeAfter(300, 200), bytes=BeforeAfter(600, 400), metric="auto", schedule="oneshot",
    calibration=CalibrationRecord("wiki", 4, 128, 32, "0" * 64), compensation=CompensationRecord(False), seed=0,
)  # fmt: skip


def run(*words: str | Path, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, [*map(str, words)], input=answer)


def make(folder: Path, *, stage: str | None = "write.json") -> Path:
    """A result of 1,000 bytes of weights, and its work folder with one file."""
    folder.mkdir(parents=True)
    RECORD.write(folder)
    (folder / "model.safetensors").write_bytes(bytes(1_000))
    if stage is not None:
        work = folder.with_name(f"{folder.name}.work")
        (work / stage).parent.mkdir(parents=True)
        (work / stage).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    make(root / "one")
    make(root / "deep" / "er" / "two", stage="heal/state.safetensors")
    (root / "three.work").mkdir()
    (root / "three.work" / "pull.json").write_text("{}")
    (root / "notes.work").mkdir()  # of somebody else
    (root / "notes.work" / "text.txt").write_text("mine")
    (root / "bent").mkdir()
    (root / "bent" / "gradmap.json").write_text("[]")
    too_deep = root.joinpath(*"abcd"[: DEPTH + 1])
    make(too_deep / "four")
    return root


def test_runs_are_found_by_their_records(root: Path) -> None:
    found = {run.folder.relative_to(root).as_posix(): run for run in find_runs(root)}
    assert list(found) == ["bent", "deep/er/two", "one", "three"]
    assert [name for name, run in found.items() if run.finished] == ["one"]
    assert found["one"].bytes == 1_000 + (root / "one" / "gradmap.json").stat().st_size
    assert found["one"].work_bytes == 2 and found["deep/er/two"].healing
    assert "cannot be read as a record" in found["bent"].problem and found["three"].problem == "not finished"


def test_what_is_listed(root: Path) -> None:
    shown = run("list", root)
    assert shown.exit_code == 0
    assert "deep/er/two" in shown.output and "healing unfinished" in shown.output
    answer = json.loads(run("list", root, "--json").stdout)
    one = next(entry for entry in answer["runs"] if entry["folder"] == str(root / "one"))
    assert one["finished"] and one["original"] == RECORD.base.name and one["removed"] == RECORD.removed
    assert "No runs in" in run("list", root / "notes.work").output


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "link").symlink_to(root)
    assert find_runs(away) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        find_runs(tmp_path / "gone")


def test_nothing_is_deleted_before_the_answer(root: Path) -> None:
    for words, answer in ((["--dry-run"], None), ([], "n\n"), ([], ""), (["--json"], None)):
        run("clean", root, *words, answer=answer)
        assert (root / "one.work" / "write.json").is_file()


def test_work_folders_of_finished_runs_are_deleted(root: Path) -> None:
    assert run("clean", root, answer="y\n").exit_code == 0
    left = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.work"))
    assert left == ["a/b/c/d/four.work", "deep/er/two.work", "notes.work", "three.work"]
    assert (root / "one" / "model.safetensors").is_file()
    answer = json.loads(run("clean", root, "--unfinished", "--yes", "--json").stdout)
    assert sorted(answer["deleted"]) == [str(root / "deep/er/two.work"), str(root / "three.work")]
    assert sorted(path.name for path in root.rglob("*.work")) == ["four.work", "notes.work"]


def test_a_run_in_progress_keeps_its_folder(root: Path) -> None:
    with exclusive(root / "one"):
        done = run("clean", root, "--yes", "--json")
    assert done.exit_code == 1
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["deleted"] == [] and "Another run works on" in answer["kept"][str(root / "one.work")]
    assert (root / "one.work" / "write.json").is_file()
