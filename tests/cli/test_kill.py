"""kill -9 at twenty points of a push: nothing half is ever public, and one more run completes it without sending a byte
again.

The points are requests of the push, counted by the Hub, which kills the client before or after the effect of one. What
was computed before is on disk: stages that are killed are tested in test_push.py.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.local_hub import ANY, Fault, LocalHub, Request

Sums = Callable[[Path], dict[str, str]]
POINTS = 20
REPOSITORIES = (("model", "ada/out", "out"), ("space", "ada/out-compare", "out-space"))
TABLE = "What kill -9 leaves of a push"


@dataclass
class Stage:
    """A Hub that knows nothing of the push yet, and a folder in which all that is to be computed has been."""

    hub: LocalHub
    cli: Any
    folder: Path
    command: list[str | Path] = field(default_factory=list)

    def push(self) -> Any:
        return self.cli.run(*self.command, cwd=self.folder, HF_ENDPOINT=self.hub.url, TEST_SHORT_SLEEPS="1")

    def push_killed(self, number: int, when: str) -> subprocess.Popen[str]:
        """The same, killed at its request of that number, counted from 0."""
        started: list[subprocess.Popen[str]] = []

        def kill() -> None:
            started[0].kill()
            started[0].wait()

        self.hub.faults.add(Fault(ANY, "reset-before" if when == "before" else "reset-after", skip=number, then=kill))
        process = self.cli.start(*self.command, cwd=self.folder, HF_ENDPOINT=self.hub.url, TEST_SHORT_SLEEPS="1")
        started.append(process)
        process.communicate(timeout=180)
        deadline = time.monotonic() + 10
        while len(self.hub.requests) <= number and time.monotonic() < deadline:  # logged a moment later
            time.sleep(0.01)
        return process

    def content(self, kind: str, repo_id: str, cache: Path, sums: Sums) -> dict[str, str]:
        """What is published there now."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.hub.url, token=self.cli.token)
        found = sums(Path(api.snapshot_download(repo_id, repo_type=kind, cache_dir=cache)))
        found.pop(".gitattributes", None)
        return found

    def states(self) -> dict[str, tuple[bool, int]]:
        """{repository: (private, commits)}."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.hub.url, token=self.cli.token)
        return {
            repo_id: (
                bool(api.repo_info(repo_id, repo_type=kind).private),
                len(api.list_repo_commits(repo_id, repo_type=kind)),
            )
            for kind, repo_id, _ in REPOSITORIES
            if api.repo_exists(repo_id, repo_type=kind)
        }


@pytest.fixture(scope="module")
def open_stage(start_world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Opens a stage of its own, as often as asked: copies of one Hub before the push and one folder after it."""
    world = start_world()
    blank = world.root / "blank"
    shutil.copytree(world.hub.root, blank)
    built = world.root / "built"
    built.mkdir()
    command = [
        "push", "acme/tiny", "--layers", "2", "--output", "out", "--no-onnx", "--public", "--json", *world.cli.quick,
    ]  # fmt: skip
    first = world.cli.run(*command, cwd=built)
    assert first.code == 0, first.err

    @contextmanager
    def opened() -> Iterator[Stage]:
        root = tmp_path_factory.mktemp("stage")
        shutil.copytree(blank, root / "hub")
        shutil.copytree(built, root / "here")
        with LocalHub(root / "hub") as hub:
            assert hub.add_user("ada", orgs=["club"]) == world.cli.token
            yield Stage(hub, world.cli, root / "here", [*command, "--resume"])
        shutil.rmtree(root)

    return opened


@dataclass(frozen=True)
class Whole:
    """The push without a fault: its requests, and what it published."""

    requests: list[Request]
    content: dict[str, dict[str, str]]
    states: dict[str, tuple[bool, int]]


@pytest.fixture(scope="module")
def whole(open_stage: Callable[..., Any], sums_of_folder: Sums, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with open_stage() as stage:
        done = stage.push()
        assert done.code == 0, done.err
        requests = list(stage.hub.requests)
        cache = tmp_path_factory.mktemp("cache")
        content = {
            repo_id: stage.content(kind, repo_id, cache / kind, sums_of_folder) for kind, repo_id, _ in REPOSITORIES
        }
        states = stage.states()
    assert states == {repo_id: (False, 2) for _, repo_id, _ in REPOSITORIES}
    return Whole(requests, content, states)


def points_of(requests: list[Request]) -> list[tuple[int, str]]:
    """Before and after every request that changes something, thinned out evenly to twenty."""
    writing = [number for number, entry in enumerate(requests) if entry.method not in ("GET", "HEAD")]
    every = [(number, when) for number in writing for when in ("before", "after")]
    assert len(every) >= POINTS
    return [every[round(index * (len(every) - 1) / (POINTS - 1))] for index in range(POINTS)]


def sent_twice(first: list[Request], second: list[Request], when: str) -> list[str]:
    """Objects that were sent again though the Hub had all of them. An answer of 0 is that of the killed request."""
    having = {entry.path for entry in first if entry.route == "lfs-put" and entry.status == 200}
    if when == "after":
        having |= {entry.path for entry in first if entry.route == "lfs-put" and entry.status == 0}
    again = [entry.path for entry in second if entry.route == "lfs-put"]
    return [path for path in again if path in having or again.count(path) > 1]


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("index", range(POINTS))
def test_killed_and_run_again(
    open_stage: Callable[..., Any],
    whole: Whole,
    sums: Sums,
    tmp_path: Path,
    index: int,
    record_property: Callable[[str, object], None],
) -> None:
    number, when = points_of(whole.requests)[index]
    point = whole.requests[number]
    with open_stage() as stage:
        process = stage.push_killed(number, when)
        assert process.returncode == -signal.SIGKILL and len(stage.hub.faults.fired) == 1
        killed = stage.hub.requests[-1]
        assert (killed.route, killed.status) == (point.route, 0)
        first = list(stage.hub.requests)
        left = stage.states()
        for kind, repo_id, _ in REPOSITORIES:
            private, _ = left.get(repo_id, (True, 0))
            if not private:  # public means whole
                assert stage.content(kind, repo_id, tmp_path / f"left-{kind}", sums) == whole.content[repo_id]
        asked = len(stage.hub.requests)
        done = stage.push()
        assert done.code == 0, done.err
        second = stage.hub.requests[asked:]
        assert stage.states() == whole.states
        for kind, repo_id, folder in REPOSITORIES:
            found = stage.content(kind, repo_id, tmp_path / kind, sums)
            assert found == whole.content[repo_id] == sums(stage.folder / folder)
        assert sent_twice(first, second, when) == []
    row = f"{index + 1}. request {number + 1} of {len(whole.requests)}, {when} its effect: {point.method} {point.route}"
    sent = sum(entry.received for entry in second if entry.route == "lfs-put")
    record_property("reliability", (TABLE, row, "left on the Hub", _in_words(left)))
    record_property("reliability", (TABLE, row, "large files the next run sent", f"{sent:,} bytes"))
    record_property("reliability", (TABLE, row, "after it", "equal to a run without a fault"))


def _in_words(left: dict[str, tuple[bool, int]]) -> str:
    names = {repo_id: kind for kind, repo_id, _ in REPOSITORIES}
    words = [
        f"{names[repo_id]} {'private' if private else 'public'}, {'complete' if commits > 1 else 'empty'}"
        for repo_id, (private, commits) in left.items()
    ]
    return "; ".join(words) or "nothing"
