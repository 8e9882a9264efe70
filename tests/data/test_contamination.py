"""Evaluation sequences with a 13-gram overlap with calibration sequences: found, listed, refused if they are most."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PruneConfig
from gradmap_hub.data.contamination import WORDS, runs_of_words, shared_rows
from gradmap_hub.errors import CalibrationError
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.progress import SilentReporter
from gradmap_hub.record import RunRecord

TWELVE = "the quick brown fox jumps over the lazy dog while it rains"


def test_thirteen_words_whatever_their_case_and_signs() -> None:
    thirteen = f"{TWELVE} hard"
    assert len(list(runs_of_words(thirteen))) == 1 and not list(runs_of_words(TWELVE))
    rows = [f"Before. {thirteen.upper().replace(' ', ', ')}!", f"{TWELVE} softly on us all", thirteen[:-1]]
    assert shared_rows(rows, [f"something else, {thirteen}, and more"]) == [0]
    assert shared_rows(rows, [thirteen[4:]]) == [] and shared_rows(rows, []) == []
    assert WORDS == 13


def test_default_sizes_take_well_under_a_second() -> None:
    row = " ".join(f"word{number}" for number in range(400))
    rows = [f"{index} {row}".replace("word", f"w{index}x") for index in range(48)]
    began = time.monotonic()
    assert shared_rows(rows[:12], rows[12:]) == []
    assert time.monotonic() - began < 1


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def quick(calibration: Path, evaluation: Path, samples: int = 8) -> PruneConfig:
    return PruneConfig(
        layers=1, calibration=(str(calibration),), eval_text=(str(evaluation),), samples=samples, seq_len=128,
        eval_rows=4, compensation="none", metric="block-influence",
    )  # fmt: skip


def test_prune_names_the_rows_and_refuses_most_of_a_text(
    tiny_folder: Path, tmp_path: Path, text_of: Any, tokenizer: Any
) -> None:
    calibration, evaluation = tmp_path / "calibration.txt", tmp_path / "evaluation.txt"
    shared = text_of(9_000, 1)
    calibration.write_text(shared)
    # So that all but a few of its rows are drawn: a quarter of the samples, as many rows, choose between layers.
    samples = (len(tokenizer(shared)["input_ids"]) // 128 - 5) * 4 // 5
    # Four rows spread over five parts; that of the calibration text is one of them.
    evaluation.write_text(text_of(9_000, 2) + shared + text_of(18_000, 3) + text_of(9_000, 4))
    reporter = Notes()
    record = prune(str(tiny_folder), tmp_path / "small", quick(calibration, evaluation, samples), reporter=reporter)
    assert record.evaluation is not None
    held_out, extra = record.evaluation.texts
    assert held_out.contaminated is None
    assert extra.contaminated and 2 * len(extra.contaminated) <= extra.rows
    said = [note for note in reporter.notes if "13-gram overlap" in note]
    assert len(said) == 1 and f"{len(extra.contaminated)} of the 4 sequences of evaluation.txt" in said[0]
    assert "calibration.txt" in said[0]
    back = RunRecord.read(tmp_path / "small").evaluation
    assert back is not None and back.texts[1].contaminated == extra.contaminated
    evaluation.write_text(shared + "\n")  # the same text, but for its sum
    with pytest.raises(CalibrationError) as caught:
        prune(str(tiny_folder), tmp_path / "refused", quick(calibration, evaluation, samples))
    assert "evaluation.txt" in caught.value.message and "calibration.txt" in caught.value.message
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_other_text_is_clean(tiny_folder: Path, tmp_path: Path, text_file: Path, text_of: Any) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_of(20_000, 9))
    reporter = Notes()
    record = prune(str(tiny_folder), tmp_path / "small", quick(text_file, other), reporter=reporter)
    assert record.evaluation is not None and record.evaluation.texts[1].contaminated == []
    assert not reporter.notes
