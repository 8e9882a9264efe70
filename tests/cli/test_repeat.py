"""`--from gradmap.json`: record and text give the same bytes again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.models.transformers_compat import has_5

pytestmark = pytest.mark.long  # whole pushes

Sums = Callable[[Path], dict[str, str]]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def first(world: Any, variant: Any) -> Path:
    """A published push with settings that are not the defaults; afterwards the original's main branch moves on."""
    folder = world.root / "first"
    done = world.cli.run(
        "push", "acme/tiny", "--layers", "2", "--seed", "3", "--schedule", "iterative", "--output", folder,
        "--no-onnx", "--no-space", *world.cli.quick, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err

    def change(base: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        weights = load_file(base / WEIGHTS)
        save_file({name: value + 0.01 * torch.ones_like(value) for name, value in weights.items()}, base / WEIGHTS)

    world.hub.seed("acme/tiny", variant(change=change))
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gradmap.json").read_text())


@pytest.mark.slow
def test_push_again(world: Any, first: Path, tmp_path: Path, sums: Sums) -> None:
    """From the file alone: the text is named on the command line, everything else is in the record."""
    lonely = tmp_path / "sent-to-me.json"
    shutil.copyfile(first / "gradmap.json", lonely)
    done = world.cli.run(
        "push", "--from", lonely, "-c", world.text, "--output", "again", "--to", "ada/again", "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert sums(tmp_path / "again")[WEIGHTS] == sums(first)[WEIGHTS]
    before, after = record_of(first), record_of(tmp_path / "again")
    for name in ("settings", "removed", "calibration", "compensation", "candidates", "artifacts"):
        assert after[name] == before[name], name
    assert after["base"]["commit"] == before["base"]["commit"]
    assert set(done.json["space"]) == {"reason"} and not (tmp_path / "again" / "onnx").exists()  # as the first
    assert after["command"].startswith("gradmap-hub push --from sent-to-me.json -c text.txt")
    assert "gradmap-hub push --from gradmap.json\n" in (tmp_path / "again" / "README.md").read_text()


def test_prune_again_from_the_published_repository(world: Any, first: Path, tmp_path: Path, sums: Sums) -> None:
    """The text lies in the folder where the command runs."""
    shutil.copyfile(world.text, tmp_path / "text.txt")
    done = world.cli.run("prune", "--from", "ada/first", "again", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert sums(tmp_path / "again")[WEIGHTS] == sums(first)[WEIGHTS]
    assert "prune OUTPUT --from gradmap.json" in (tmp_path / "again" / "README.md").read_text()


def test_changed_text_is_refused(world: Any, first: Path, tmp_path: Path) -> None:
    changed = tmp_path / "text.txt"
    changed.write_text(world.text.read_text().replace("river", "ocean", 1))
    before, asked = world.repositories(), len(world.hub.requests)
    for command in (("push", "--output", "again"), ("prune", "again")):
        done = world.cli.run(*command, "--from", first, "-c", changed, cwd=tmp_path)
        assert done.code == 1 and done.err.startswith(f"error {changed} is not the recorded text"), done.err
        assert "sha256" in done.err and "Traceback" not in done.err
    done = world.cli.run("push", "--from", first, cwd=tmp_path)  # the same file, found by its name
    assert done.code == 1 and "is not the recorded text" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert world.repositories() == before and not world.weights_asked_for(asked)


def test_options_override_the_record(world: Any, first: Path, tmp_path: Path) -> None:
    command = ["push", "--from", first, "-c", world.text, "--dry-run", "--json"]
    same = world.cli.run(*command, cwd=tmp_path)
    assert same.code == 0, same.err
    assert same.json["layers"] == {"before": 5, "after": 3} and same.json["space"] is None
    assert same.json["commit"] == record_of(first)["base"]["commit"]
    other = world.cli.run(*command, "--ratio", "0.2", "--space", "--to", "club/x", cwd=tmp_path).json
    assert other["layers"] == {"before": 5, "after": 4}
    # Without ONNX files the Space loads the original with transformers 4.57.
    assert other["space"] == (None if has_5() else "club/x-compare")


def test_nothing_to_go_on(world: Any, tmp_path: Path) -> None:
    for command, code, words in (
        (("push",), 2, "--from"),
        (("prune", "acme/tiny"), 2, "OUTPUT"),
        (("push", "--from", "nowhere.json"), 1, "The record nowhere.json does not exist"),
        (("push", "--from", "acme/nothing"), 1, "no model acme/nothing"),
        (("push", "--from", "acme/tiny"), 1, "acme/tiny has no gradmap.json"),
    ):
        done = world.cli.run(*command, cwd=tmp_path)
        assert done.code == code and words in done.err and "Traceback" not in done.err, done.err
