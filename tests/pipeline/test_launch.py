"""`accelerate launch -m gradmap_hub heal`: two processes make the folder that one makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import UsageError
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.record import RunRecord

pytestmark = pytest.mark.long

LAUNCH = (
    "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
    "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "gradmap_hub",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[..., Path], text_of: Callable[..., str]) -> Path:
    root = tmp_path_factory.mktemp("launch")
    folder_of(root / "original")
    (root / "text.txt").write_text(text_of(40_000, 1), encoding="utf-8")
    config = PruneConfig(drop=(1, 3), calibration=(str(root / "text.txt"),), samples=6, seq_len=32, eval_rows=2)
    prune(str(root / "original"), root / "small", config)
    return root


def run(root: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=root, capture_output=True, text=True, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_heal_a_folder_as_one_does(root: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(root / "small", root / name)
    options = ("--tokens", "8k", "--against", "original")
    alone = run(root, "-m", "gradmap_hub", "heal", "one", *options)
    both = run(root, *LAUNCH, "heal", "two", *options)
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr
    assert both.stdout.count("Publish it with") == 1  # the main process alone answers
    one, two = (RunRecord.read(root / name).heal for name in ("one", "two"))
    assert one is not None and two is not None and one.applied == two.applied
    assert two.loss_after == pytest.approx(one.loss_after, abs=1e-3)
    assert two.divergence_after == pytest.approx(one.divergence_after or 0, abs=1e-3)
    assert not (root / "two.work" / "teacher").exists()


def test_what_one_process_does_is_not_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        prune("original", tmp_path / "out", PruneConfig(layers=2))
