"""Resuming: what is reused, what is computed again, and what an interruption may not leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import GradmapError
from gradmap_hub.progress import SilentReporter
from gradmap_hub.stage_cache import Stages


@dataclass(frozen=True)
class Result:
    value: int
    items: list[float]


class Recorder(SilentReporter):
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, title: str) -> None:
        self.events.append(f"start {title}")

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        self.events.append(f"{'reuse' if reused else 'done'} {note}")


class Script:
    """Three stages, one after another, each writing a file; `computed` names those that were really run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed: list[str] = []
        self.reporter = Recorder()

    def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        during: Callable[[str], None] = lambda _name: None,
    ) -> list[int]:
        self.computed = []
        stages = Stages(self.folder / "work", self.reporter, identity or {"base": "a"})
        found = []
        for number, name in enumerate(("first", "second", "third")):

            def compute(name: str = name, number: int = number) -> Result:
                self.computed.append(name)
                (self.folder / f"{name}.bin").write_bytes(b"x" * (number + 1))
                during(name)
                return Result(number, [0.5])

            result = stages.run(
                name,
                f"Stage {name}",
                Result,
                compute,
                inputs={"setting": (inputs or {}).get(name, 0)},
                files=lambda name=name: [self.folder / f"{name}.bin"],
                describe=lambda result: f"value {result.value}",
            )
            assert isinstance(result, Result) and result.items == [0.5]
            found.append(result.value)
        assert set(stages.timings) == {"first", "second", "third"}
        return found


@pytest.fixture
def script(tmp_path: Path) -> Script:
    made = Script(tmp_path)
    assert made.run() == [0, 1, 2]
    assert made.computed == ["first", "second", "third"]
    return made


def test_everything_is_reused(script: Script) -> None:
    assert script.run() == [0, 1, 2]
    assert script.computed == []
    assert script.reporter.events[-2:] == ["start Stage third", "reuse value 2"]
    assert script.reporter.events[4:6] == ["start Stage third", "done value 2"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [("first", ["first", "second", "third"]), ("second", ["second", "third"]), ("third", ["third"])],
)
def test_a_change_recomputes_what_is_downstream_and_nothing_else(
    changed: str, again: list[str], script: Script
) -> None:
    script.run({changed: 1})
    assert script.computed == again
    script.run({changed: 1})
    assert script.computed == []


def test_another_model_recomputes_everything(script: Script) -> None:
    script.run(identity={"base": "b"})
    assert script.computed == ["first", "second", "third"]


@pytest.mark.parametrize("damage", ["gone", "resized", "a folder"])
def test_a_file_that_is_gone_or_resized_is_made_again(damage: str, script: Script) -> None:
    path = script.folder / "second.bin"
    path.unlink()
    if damage == "resized":
        path.write_bytes(b"xyz")
    elif damage == "a folder":
        path.mkdir()
        with pytest.raises(IsADirectoryError):  # seen to be gone: it tries to write it
            script.run()
        path.rmdir()
    script.run()
    assert script.computed == ["second"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": "ab', b"[]", b"null", b"\x00" * 40, b"\xff\xfe", b'"x"'])
def test_a_stored_result_that_is_not_whole_is_ignored(content: bytes, script: Script) -> None:
    (script.folder / "work" / "second.json").write_bytes(content)
    assert script.run() == [0, 1, 2]
    assert script.computed == ["second"]


def test_a_stored_result_that_was_changed_is_named(script: Script) -> None:
    script.run()
    path = script.folder / "work" / "second.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"result": {"value": "x", "items": []}}))
    with pytest.raises(GradmapError, match=r"second.json is damaged: value is 'x'; an integer is expected"):
        script.run()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_stage_leaves_no_result(interruption: type[BaseException], tmp_path: Path) -> None:
    script = Script(tmp_path)

    def stop(name: str) -> None:
        if name == "second":
            raise interruption

    with pytest.raises(interruption):
        script.run(during=stop)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["first.json"]
    assert "done value 1" not in script.reporter.events
    assert script.run() == [0, 1, 2]
    assert script.computed == ["second", "third"]


def test_going_back_after_an_interruption_does_not_trust_the_files(script: Script) -> None:
    """Other settings, interrupted once the files were overwritten (same size, other content), then the first
    settings again: the old result must not vouch for the new files."""

    def stop(name: str) -> None:
        if name == "second":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.run({"second": 1}, during=stop)
    script.run()
    assert "second" in script.computed


def test_results_on_disk_are_plain_json_without_remains(script: Script) -> None:
    names = sorted(path.name for path in (script.folder / "work").iterdir())
    assert names == ["first.json", "second.json", "third.json"]
    stored = json.loads((script.folder / "work" / "second.json").read_text())
    assert stored["result"] == {"value": 1, "items": [0.5]}


def test_not_a_number_is_not_stored(tmp_path: Path) -> None:
    stages = Stages(tmp_path, SilentReporter(), {})
    with pytest.raises(ValueError):
        stages.run("s", "S", Result, lambda: Result(1, [float("nan")]))
    assert not list(tmp_path.iterdir())


def test_branches_leave_each_other_and_what_follows_alone(tmp_path: Path) -> None:
    computed: list[str] = []

    def run(stages: Stages, name: str, value: int) -> int:
        def compute() -> Result:
            computed.append(f"{name} {value}")
            return Result(value, [])

        return stages.run(name, name.title(), Result, compute, inputs={"value": value}).value

    def script(first: int = 1, left: int = 1, right: int = 1, beside: int = 1, last: int = 1) -> list[str]:
        computed.clear()
        stages = Stages(tmp_path, reporter, {})
        assert run(stages, "first", first) == first
        assert run(stages.branch("left", "To the left: "), "side", left) == left
        assert run(stages.branch("right"), "side", right) == right
        assert run(stages.branch(), "beside", beside) == beside
        assert run(stages, "last", last) == last
        assert set(stages.timings) == {"first", "beside", "last"}
        return list(computed)

    reporter = Recorder()
    everything = ["first 1", "side 1", "side 1", "beside 1", "last 1"]
    assert script() == everything and script() == []
    assert "start To the left: Side" in reporter.events and "start Side" in reporter.events
    assert script(left=2) == ["side 2"]
    assert script(left=2, beside=2) == ["beside 2"]
    assert script(left=2, beside=2, right=3) == ["side 3"]
    assert script(first=2) == ["first 2", *everything[1:]]
