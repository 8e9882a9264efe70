"""`heal FOLDER`: everything that depends on the weights is renewed together, or nothing changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gradmap_hub import heal
from gradmap_hub.cli.app import app
from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import CalibrationError, GradmapError, OutputInUse, SourceError, UsageError
from gradmap_hub.healing import heal as healing
from gradmap_hub.healing import training
from gradmap_hub.pipeline import heal_folder as module
from gradmap_hub.pipeline.export import export_folder
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.pipeline.run import exclusive
from gradmap_hub.progress import SilentReporter
from gradmap_hub.record import RunRecord

pytestmark = pytest.mark.long  # prunes and heals in folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[..., Path], text_of: Callable[..., str]) -> Path:
    """A tiny model, pruned, with its texts beside it."""
    root = tmp_path_factory.mktemp("heal")
    original = folder_of(root / "original")
    for name, size, seed in (("text.txt", 40_000, 1), ("other.txt", 8_000, 2)):
        (root / name).write_text(text_of(size, seed), encoding="utf-8")
    config = PruneConfig(
        drop=(1, 3), calibration=(str(root / "text.txt"),), eval_text=(str(root / "other.txt"),), samples=6, seq_len=32,
        eval_rows=2,
    )  # fmt: skip
    prune(str(original), root / "small", config)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and any gain counts: a random model has little to gain on text."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)
    copied = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(copied)
    return copied


def run(root: Path, tokens: int = 4096, **options: Any) -> RunRecord:
    return heal(root / "small", tokens=tokens, against=str(root / "original"), **options)


def sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_what_depends_on_the_weights_is_renewed(root: Path) -> None:
    export_folder(root / "small", ["onnx"])
    before, old = RunRecord.read(root / "small"), sums(root / "small")
    record = run(root)
    new = sums(root / "small")
    assert record == RunRecord.read(root / "small")
    assert record.heal is not None and record.heal.applied and record.heal.tokens == 4096
    assert record.heal.layers == [0, 2, 4] and [text.name for text in record.heal.texts] == ["text.txt"]
    assert set(new) == {*old, "assets/healing.png"}
    changed = {name for name in old if new[name] != old[name]}
    assert {"model.safetensors", "onnx/model.onnx", "gradmap.json", "README.md"} <= changed
    assert not changed & {"config.json", "tokenizer.json", "LICENSE", "generation_config.json"}
    for entry in record.artifacts:
        assert new[entry.path] == entry.sha256
    assert {entry.format for entry in record.artifacts} == {entry.format for entry in before.artifacts}
    assert record.evaluation is not None and before.evaluation is not None
    for after, earlier in zip(record.evaluation.texts, before.evaluation.texts, strict=True):
        assert (after.name, after.sha256, after.pruned) == (earlier.name, earlier.sha256, earlier.pruned)
        assert after.original == pytest.approx(earlier.original, rel=1e-6) and after.compensated != earlier.compensated
    assert "healed with 4,096 tokens of `text.txt`" in (root / "small" / "README.md").read_text(encoding="utf-8")
    assert not (root / "small.work" / "heal").exists() and not (root / "small.work" / "teacher").exists()


@pytest.mark.slow
def test_a_second_healing_adds_to_the_first(root: Path) -> None:
    first = run(root).heal
    second = run(root, 2048).heal
    assert first is not None and second is not None
    assert second.tokens == 4096 + 2048 and second.steps == first.steps + 2
    assert second.checks[: len(first.checks)] == first.checks and second.divergence_before == first.divergence_before


@pytest.mark.slow  # tests/healing interrupts the training itself
@pytest.mark.parametrize(
    "stage",
    ["Reading the original's predictions", "Healing, all layers", "Measuring the result"],
)
def test_an_interruption_changes_nothing_and_it_goes_on(
    root: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(SilentReporter):
        def start(self, title: str) -> None:
            self.title = title

        def advance(self, steps: int = 1) -> None:
            if self.title == stage and steps:
                raise KeyboardInterrupt

    reference = Path(shutil.copytree(root, root.with_name("reference")))
    old = sums(root / "small")
    monkeypatch.setattr(training.Recipe, "save_every", 0.0, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(root, reporter=Stopping())
    assert sums(root / "small") == old
    run(root)
    monkeypatch.chdir(reference)
    run(reference)
    wanted, found = (load_file(place / "small" / "model.safetensors") for place in (reference, root))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.slow
def test_killed_while_files_are_moved_the_next_call_finishes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_folder(root / "small", ["onnx"])
    moved: list[Any] = []

    def stop(source: Any, target: Any) -> None:
        if str(target).startswith(str(root / "small" / "onnx")) or len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", lambda a, b: stop(a, b) if "small/" in str(b) else os.rename(a, b))
        with pytest.raises(KeyboardInterrupt):
            run(root)
    (root / "text.txt").unlink()
    with pytest.raises(CalibrationError):  # after it has finished the first, it lacks the text for another
        run(root)
    record = RunRecord.read(root / "small")
    assert record.heal is not None and record.heal.tokens == 4096
    assert all(sums(root / "small")[entry.path] == entry.sha256 for entry in record.artifacts)


def test_what_does_not_help_leaves_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: False)
    old = sums(root / "small")
    record = run(root)
    assert record.heal is None and sums(root / "small") == old


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        ("weights", SourceError, "is not the file that gradmap.json describes"),
        ("text", CalibrationError, "text.txt"),
        ("original", GradmapError, "original"),
        ("record", SourceError, "gradmap.json"),
    ],
)
def test_refused_in_one_line_and_nothing_changes(root: Path, damage: str, kind: type[GradmapError], words: str) -> None:
    match damage:
        case "weights":
            with (root / "small" / "model.safetensors").open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\0\0\x80\x3f")
        case "text":
            (root / "text.txt").unlink()
        case "original":
            shutil.rmtree(root / "original")
        case "record":
            (root / "small" / "gradmap.json").unlink()
    old = sums(root / "small")
    with pytest.raises(kind, match=words) as caught:
        run(root)
    assert "\n" not in caught.value.message and sums(root / "small") == old


def test_a_folder_that_another_run_works_on_is_left_alone(root: Path) -> None:
    with exclusive(root / "small"), pytest.raises(OutputInUse, match="Another run works on"):
        run(root)
    with pytest.raises(SourceError, match="nothing"):
        heal(root / "nothing", tokens=64)
    assert not (root / "nothing.work").exists()


@pytest.mark.parametrize(
    "options",
    [(), ("--tokens", "0"), ("--tokens", "-5"), ("--tokens", "10X"), ("--tokens", "30m"), ("--time", "10"),
     ("--tokens", "5k", "--time", "5m"), ("--tokens", "5k", "--part", "head")],
)  # fmt: skip
def test_a_budget_that_is_none(options: tuple[str, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["heal", str(tmp_path / "no-folder"), *options])
    assert isinstance(done.exception, UsageError) and "--" in done.exception.message


@pytest.mark.slow
def test_the_command_prints_one_object(root: Path) -> None:
    import json

    done = CliRunner().invoke(
        app, ["heal", str(root / "small"), "--tokens", "2k", "--against", str(root / "original"), "--json", "--quiet"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(root / "small")
