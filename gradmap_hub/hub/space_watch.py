"""Waits, up to a time limit, while the Hub builds and starts a published Space."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.failures import status_line
from gradmap_hub.hub.refusals import CLIENT_ERRORS
from gradmap_hub.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub import SpaceRuntime

# Failed stages, and the log of the Hub that shows the reason.
_FAILED = {"BUILD_ERROR": "build", "CONFIG_ERROR": "build", "RUNTIME_ERROR": "container"}
_RESTING = ("PAUSED", "STOPPED", "SLEEPING", "DELETING")
# Seconds between two requests: short at first, because the Space may be built already.
_FIRST, _LONGEST = 1.0, 15.0


@dataclass(frozen=True)
class SpaceState:
    """The state of a Space. `stage`: that of the Hub, empty if it could not be read; `failed`: whether it cannot run;
    `words`: one line for the terminal."""

    stage: str
    failed: bool
    words: str


def watch_space(hub: Hub, repo_id: str, commit: str, seconds: float, reporter: Reporter) -> SpaceState:
    """Request the state of a Space until it runs, fails or is paused, or until `seconds` have passed. Raises nothing:
    the Space is already published.

    Args:
        hub: The Hub.
        repo_id: The Space.
        commit: The published commit; the state of an earlier one is ignored.
        seconds: The longest wait.
        reporter: Receives the state.
    """
    reporter.start("Waiting for the Space to start")
    started, waited, pause = time.monotonic(), 0.0, _FIRST
    while True:
        try:
            runtime = hub.attempt(lambda: hub.api.get_space_runtime(repo_id), brief=True)
        except CLIENT_ERRORS as error:
            return _report(reporter, SpaceState("", False, f"its state could not be read ({status_line(error)})"))
        state = _state(hub, repo_id, runtime, commit)
        # Count the waits too: an injected `sleep` may not really sleep.
        left = seconds - max(waited, time.monotonic() - started)
        if state is not None:
            return _report(reporter, state)
        if left <= 0:
            url = hub.url(repo_id, "space")
            words = f"{_stage_text(runtime.stage)} after {seconds:.0f} s, still in progress: {url}"
            return _report(reporter, SpaceState(str(runtime.stage), False, words))
        wait = min(pause, left)
        hub.patience.sleep(wait)
        waited += wait
        pause = min(2 * pause, _LONGEST)


def _state(hub: Hub, repo_id: str, runtime: SpaceRuntime, commit: str) -> SpaceState | None:
    """The final state; None while the Space is being built or started."""
    stage, url = str(runtime.stage), hub.url(repo_id, "space")
    if runtime.raw.get("sha") not in (None, commit):  # the previous commit still runs
        return None
    if stage in _FAILED:
        message = " ".join(str(runtime.raw.get("errorMessage") or "").split())[:300]
        words = f"{_stage_text(stage)}{': ' + message if message else ''}; log: {url}?logs={_FAILED[stage]}"
        return SpaceState(stage, True, words)
    if stage == "RUNNING":
        hardware = f" on {runtime.hardware}" if runtime.hardware else ""
        return SpaceState(stage, False, f"running{hardware}: {url}")
    if stage in _RESTING:
        return SpaceState(stage, False, f"{_stage_text(stage)}: {url}")
    return None


def _stage_text(stage: object) -> str:
    """BUILD_ERROR -> build error."""
    return str(stage).lower().replace("_", " ")


def _report(reporter: Reporter, state: SpaceState) -> SpaceState:
    if state.stage == "RUNNING":
        reporter.finish(state.words)
    else:
        reporter.finish(_stage_text(state.stage) if state.stage else "unknown")
        reporter.note(f"The Space: {state.words}")
    return state
