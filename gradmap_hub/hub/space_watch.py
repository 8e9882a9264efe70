"""Looking at a published Space while the Hub builds and starts it: for so long, and no longer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmap_hub.hub.client import Hub, status_line
from gradmap_hub.hub.refusals import CLIENT_ERRORS
from gradmap_hub.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub import SpaceRuntime

# Where it ends badly, and which of the Hub's two logs says why.
_FAILED = {"BUILD_ERROR": "build", "CONFIG_ERROR": "build", "RUNTIME_ERROR": "container"}
_RESTING = ("PAUSED", "STOPPED", "SLEEPING", "DELETING")
# Seconds between two looks: at first often, for what is built already.
_FIRST, _LONGEST = 1.0, 15.0


@dataclass(frozen=True)
class SpaceState:
    """How far a Space has come. `stage`: the Hub's word; empty if it could not be read. `failed`: it will not run as
    it is. `words`: one line for people."""

    stage: str
    failed: bool
    words: str


def watch_space(hub: Hub, repo_id: str, commit: str, seconds: float, reporter: Reporter) -> SpaceState:
    """Ask for the runtime of a Space until it runs, fails or rests, or `seconds` have gone by. Nothing is raised: the
    Space is published whatever comes of it."""
    reporter.start("Waiting for the Space to start")
    started, waited, pause = time.monotonic(), 0.0, _FIRST
    while True:
        try:
            runtime = hub.attempt(lambda: hub.api.get_space_runtime(repo_id), brief=True)
        except CLIENT_ERRORS as error:
            return _told(reporter, SpaceState("", False, f"its state could not be read ({status_line(error)})"))
        state = _state(hub, repo_id, runtime, commit)
        # What is waited for counts as well as the clock: whoever sets the sleep may not really sleep.
        left = seconds - max(waited, time.monotonic() - started)
        if state is not None:
            return _told(reporter, state)
        if left <= 0:
            words = f"{_in_words(runtime.stage)} after {seconds:.0f} s, and goes on: {hub.url(repo_id, 'space')}"
            return _told(reporter, SpaceState(str(runtime.stage), False, words))
        wait = min(pause, left)
        hub.patience.sleep(wait)
        waited += wait
        pause = min(2 * pause, _LONGEST)


def _state(hub: Hub, repo_id: str, runtime: SpaceRuntime, commit: str) -> SpaceState | None:
    """The state that this answer ends with; None while the Space is on its way."""
    stage, url = str(runtime.stage), hub.url(repo_id, "space")
    if runtime.raw.get("sha") not in (None, commit):  # of the commit before ours, which still runs
        return None
    if stage in _FAILED:
        said = " ".join(str(runtime.raw.get("errorMessage") or "").split())[:300]
        words = f"{_in_words(stage)}{': ' + said if said else ''}; its log: {url}?logs={_FAILED[stage]}"
        return SpaceState(stage, True, words)
    if stage == "RUNNING":
        hardware = f" on {runtime.hardware}" if runtime.hardware else ""
        return SpaceState(stage, False, f"running{hardware}: {url}")
    if stage in _RESTING:
        return SpaceState(stage, False, f"{_in_words(stage)}: {url}")
    return None


def _in_words(stage: object) -> str:
    """BUILD_ERROR -> build error."""
    return str(stage).lower().replace("_", " ")


def _told(reporter: Reporter, state: SpaceState) -> SpaceState:
    if state.stage == "RUNNING":
        reporter.finish(state.words)
    else:
        reporter.finish(_in_words(state.stage) if state.stage else "not known")
        reporter.note(f"The Space: {state.words}")
    return state
