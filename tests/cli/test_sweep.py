"""`gradmap-hub sweep` as a user runs it: a model on the Hub, Ctrl-C in the middle, and the same command again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_and_the_same_command_again(world: Any, tmp_path: Path) -> None:
    command = ["sweep", "acme/tiny", tmp_path / "swept", "--ratios", "0.2,0.4,0.6", *world.cli.quick]
    done = world.cli.run_until("done  Without 1 of 5 layers: Timing", signal.SIGINT, *command)
    assert done.code == 130 and done.out == "" and "Traceback" not in done.err
    assert "Run the same command again to continue" in done.err and "--resume" not in done.err
    again = world.cli.run(*command, "--json")
    assert again.code == 0, again.err
    lines = again.err.splitlines()
    assert [line for line in lines if "Without 1 of 5" in line and "(on disk)" in line]
    assert not [line for line in lines if "Without 1 of 5" in line and "(on disk)" not in line]
    assert not [line for line in lines if "Without 3 of 5" in line and "(on disk)" in line]
    answer = again.json
    assert [len(point["removed"]) for point in answer["points"]] == [1, 2, 3]
    assert answer["base"]["commit"] and answer["command"].startswith("gradmap-hub sweep acme/tiny swept --ratios")
    assert all(point["speed"]["decode"]["ratio"] > 0 for point in answer["points"])


@pytest.mark.slow
@pytest.mark.long
def test_bad_ratios_ask_the_hub_for_nothing(world: Any, tmp_path: Path) -> None:
    asked = len(world.hub.requests)
    done = world.cli.run("sweep", "acme/tiny", "--ratios", "0.2,7", cwd=tmp_path)
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1, done.err
    assert "--ratios" in done.err and len(world.hub.requests) == asked and not list(tmp_path.iterdir())
