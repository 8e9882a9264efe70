"""Healing as a stage: from the command line to the written file, its record and its card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from gradmap_hub.budget import Budget, parse_budget
from gradmap_hub.card.card import card_text
from gradmap_hub.cli.app import app
from gradmap_hub.errors import CalibrationError, UsageError
from gradmap_hub.healing import heal as healing
from gradmap_hub.record import HealCheck, HealRecord, RunRecord, TextSource

pytestmark = pytest.mark.long  # prunes, heals and writes text with models

KEPT = [0, 2, 4]


def prune_tiny(folder: Path, output: Path, text: Path, *options: str) -> Any:
    command = ["prune", str(folder), str(output), "--drop", "1,3", "--samples", "6", "--seq-len", "32",
               "--eval-rows", "2", "-c", str(text), "--json", "--quiet", *options]  # fmt: skip
    return CliRunner().invoke(app, command, catch_exceptions=True)


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_prune_writes_what_healing_found(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also that --resume takes the result from disk, and that other steps or none are not mistaken for it."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)  # a random model has little to gain on text
    output = tmp_path / "healed"
    done = prune_tiny(tiny_folder, output, text_file, "--heal", "4")
    assert done.exit_code == 0, done.output
    record = RunRecord.read(output)
    assert record.heal is not None and record.heal.applied and record.heal.steps == 4
    assert record.heal.tokens == 4 * 32 * 32 and record.heal.layers == KEPT and record.heal.part == "all"
    assert [text.name for text in record.heal.texts] == [text_file.name]
    found = load_healed(output)
    written = weights(output)
    assert found
    for key, value in found.items():
        layer, _, name = key.partition(":")
        assert torch.equal(written[f"model.layers.{KEPT.index(int(layer))}.{name}"], value)
    assert "heal" in record.timings
    assert "healed" in (output / "README.md").read_text(encoding="utf-8")

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(healing, "heal_model", never)
        again = prune_tiny(tiny_folder, output, text_file, "--heal", "4", "--resume")
        assert again.exit_code == 0, again.output
        for budget in ("5", "5k"):
            other = prune_tiny(tiny_folder, output, text_file, "--heal", budget, "--resume")
            assert isinstance(other.exception, AssertionError)
        plain = prune_tiny(tiny_folder, output, text_file, "--resume")
    assert plain.exit_code == 0, plain.output
    assert RunRecord.read(output).heal is None
    assert any(not torch.equal(value, written[name]) for name, value in weights(output).items())


def test_budgets() -> None:
    assert parse_budget("500k") == Budget(500_000, "tokens") and parse_budget("1.5M") == Budget(1_500_000, "tokens")
    assert parse_budget("30m") == Budget(1800, "seconds") and parse_budget("2h") == Budget(7200, "seconds")
    assert parse_budget(20) == parse_budget("20") == Budget(20, "steps")
    assert parse_budget("0") is None is parse_budget(0)
    for wrong in ("10X", "0M", "-5", "1.5", "M", "", "1e6", "5 k"):
        with pytest.raises(UsageError, match="--heal takes tokens"):
            parse_budget(wrong)


@pytest.mark.slow
def test_low_memory_heals_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The original is streamed; the pruned model is trained in memory."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)
    for output, options in (("whole", ()), ("streamed", ("--low-memory",))):
        done = prune_tiny(tiny_folder, tmp_path / output, text_file, "--heal", "2", *options)
        assert done.exit_code == 0, done.output
    first, second = (weights(tmp_path / output) for output in ("whole", "streamed"))
    assert all(torch.allclose(value, second[name], atol=1e-5) for name, value in first.items())


@pytest.mark.slow
def test_a_time_becomes_tokens(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    done = prune_tiny(tiny_folder, tmp_path / "out", text_file, "--heal", "2s")
    assert done.exit_code == 0, done.output
    healed = RunRecord.read(tmp_path / "out").heal
    assert healed is not None and healed.tokens >= 1024 and healed.seconds < 10


@pytest.mark.slow
def test_text_shorter_than_the_budget_is_read_again(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text(encoding="utf-8")[:5000], encoding="utf-8")
    done = prune_tiny(tiny_folder, tmp_path / "out", text_file, "--heal", "6k", "--heal-text", str(short))
    assert done.exit_code == 0, done.output
    healed = RunRecord.read(tmp_path / "out").heal
    assert healed is not None and healed.repeats > 1
    read = sum(text.rows for text in healed.texts) * 32
    assert healed.tokens == pytest.approx(healed.repeats * read, rel=0.02)


def test_text_too_short_to_hold_out(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words, and no more than that.\n", encoding="utf-8")
    done = prune_tiny(tiny_folder, tmp_path / "out", text_file, "--heal", "2", "--heal-text", str(short))
    assert isinstance(done.exception, CalibrationError) and "too short to heal on" in done.exception.message


@pytest.mark.slow
def test_own_text_is_written_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)
    output = tmp_path / "out"
    own = ("--heal", "1k", "--heal-text", "self", "-c", "self")
    done = prune_tiny(tiny_folder, output, text_file, *own)
    assert done.exit_code == 0, done.output
    record = RunRecord.read(output)
    assert [text.name for text in record.calibration.texts] == [text_file.name, "self"]
    assert record.heal is not None and [text.name for text in record.heal.texts] == ["self"]
    assert record.settings is not None and record.settings["heal_text"] == ["self"]
    written = (tmp_path / "out.work" / "self.jsonl").read_text(encoding="utf-8")
    assert all(json.loads(line)["text"] for line in written.splitlines())
    other = (tmp_path / "out.work" / "calibration-self.jsonl").read_text(encoding="utf-8")
    assert not set(other.splitlines()) & set(written.splitlines())
    card = card_text(record)
    assert f"| Calibration text | {text_file.name}, text that the original wrote itself |" in card
    assert "tokens of text that the original wrote itself" in card


@pytest.mark.slow
def test_own_text_is_the_same_in_another_run(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = prune_tiny(tiny_folder, tmp_path / name, text_file, "--heal", "1k", "--heal-text", "self", "-c", "self")
        assert done.exit_code == 0, done.output
    for name in ("self.jsonl", "calibration-self.jsonl"):
        one, two = (tmp_path / f"{run}.work" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_own_calibration_text_is_written_again(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """By --from, and by `heal`, which keeps the sequences that were held out."""
    done = prune_tiny(tiny_folder, tmp_path / "out", text_file, "-c", "self")
    assert done.exit_code == 0, done.output
    (tmp_path / "out" / text_file.name).write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    record = str(tmp_path / "out" / "gradmap.json")
    again = CliRunner().invoke(app, ["prune", "--from", record, str(tiny_folder), str(tmp_path / "again"), "--quiet"])
    assert again.exit_code == 0, again.output
    first, second = RunRecord.read(tmp_path / "out"), RunRecord.read(tmp_path / "again")
    assert first.calibration == second.calibration and first.evaluation == second.evaluation
    healed = CliRunner().invoke(app, ["heal", str(tmp_path / "out"), "--tokens", "1k", "--against", str(tiny_folder)])
    assert healed.exit_code == 0, healed.output


@pytest.mark.slow
def test_from_finds_the_text_of_healing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(text_file.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    done = prune_tiny(tiny_folder, tmp_path / "out", text_file, "--heal", "2", "--heal-text", str(notes))
    assert done.exit_code == 0, done.output
    record = RunRecord.read(tmp_path / "out")
    assert record.settings is not None and record.settings["heal_text"] == ["notes.txt"]
    (tmp_path / "out" / "gradmap.json").rename(tmp_path / "gradmap.json")  # the record, with its texts beside it
    if not (tmp_path / text_file.name).exists():
        (tmp_path / text_file.name).write_bytes(text_file.read_bytes())
    command = ["prune", str(tiny_folder), str(tmp_path / "again"), "--from", str(tmp_path / "gradmap.json"), "--quiet"]
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert all(
        torch.equal(value, weights(tmp_path / "again")[name]) for name, value in weights(tmp_path / "out").items()
    )
    notes.write_text("other words", encoding="utf-8")
    changed = CliRunner().invoke(app, [*command[:2], str(tmp_path / "third"), *command[3:]])
    assert isinstance(changed.exception, CalibrationError) and "notes.txt" in changed.exception.message


def load_healed(output: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(output.with_name(f"{output.name}.work") / "healed.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heal", "10X"), ("--heal", "10X", "500k")),
        (("--heal", "0M"), ("--heal", "0M")),
        (("--heal", "-1"), ("--heal", "-1")),
        (("--heal", "4", "--heal-part", "head"), ("--heal-part", "gaps")),
    ],
)
def test_refused_in_one_line(options: tuple[str, ...], words: tuple[str, ...], text_file: Path, tmp_path: Path) -> None:
    done = prune_tiny(tmp_path / "nowhere", tmp_path / "out", text_file, *options)
    assert isinstance(done.exception, UsageError)
    assert "\n" not in done.exception.message and all(word in done.exception.message for word in words)
    assert not (tmp_path / "out").exists()


def test_the_card_says_it(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    done = prune_tiny(tiny_folder, output, text_file)
    assert done.exit_code == 0, done.output
    plain = dataclasses.replace(RunRecord.read(output), command="gradmap-hub prune")  # not that of pytest
    assert plain.heal is None and "heal" not in card_text(plain)
    assert "no retraining" in card_text(plain)
    checks = [HealCheck(4, 0.25, 3.0)]
    healed = dataclasses.replace(
        plain, heal=HealRecord(True, 4, 3e-4, 3.5, 3.0, "lowest held-out loss", [0, 2, 4], checks)
    )
    text = card_text(healed)
    for denied in ("no retraining", "- The model was not retrained", "Nothing was fine-tuned"):
        assert denied not in text
    for words in ("4 steps", "3.5000", "3.0000", "layers 0, 2, 4", "teacher"):
        assert words in text
    assert "healed |" in text  # the column of perplexities
    spent = dataclasses.replace(
        healed.heal, tokens=500_000, seconds=1290.0, part="all", divergence_before=1.5, divergence_after=0.5,
        texts=[TextSource("a.txt", "0", 5), TextSource("b.txt", "1", 5), TextSource("self", "2", 5)],
        checks=[HealCheck(4, 0.25, 3.0, 500_000, 0.5)],
    )  # fmt: skip
    text = card_text(dataclasses.replace(healed, heal=spent))
    first = text.split("\n## ")[0]
    assert "healed with 500,000 tokens of `a.txt`, `b.txt` and text that the original wrote itself with" in first
    assert "teacher (22 min of training)" in first
    assert "| 500,000 | 0.2500 | 0.5000 | 3.0000 |" in text and "all layers were trained" in text
    refused = HealRecord(False, 4, 3e-4, 3.5, 3.5, "it did not lower the held-out loss", [], checks)
    text = card_text(dataclasses.replace(plain, heal=refused))
    assert "no retraining" in text and "healed |" not in text and "it did not lower the held-out loss" in text
    # A record of a version that could not heal.
    path = output / "gradmap.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["heal"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert RunRecord.read(output).heal is None
