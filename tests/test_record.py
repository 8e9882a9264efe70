"""gradmap.json: everything in, everything out, tolerant of newer versions, intolerant of what is not a number."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import SourceError
from gradmap_hub.measurements import (
    BeforeAfter,
    Contamination,
    FilePerplexity,
    Measured,
    MeasuredFile,
    MeasuredMetric,
    MeasuredSpeed,
    MeasuredTask,
    MeasuredText,
    Rate,
    Sample,
)
from gradmap_hub.record import (
    FILE_NAME,
    Artifact,
    Base,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    HealCheck,
    HealRecord,
    LayerDecision,
    Parity,
    RunRecord,
    TextPerplexity,
    TextSource,
    Trial,
    VerificationRecord,
    to_json,
)


@pytest.fixture
def full() -> RunRecord:
    """A record in which no field has its default value."""
    return RunRecord(
        schema_version=1,
        gradmap_hub="9.9.9",
        command="gradmap-hub push acme/größe --ratio 0.4",
        name="größe-gradmap-40",
        base=Base(
            name="acme/größe",
            repo_id="acme/größe",
            revision="main",
            commit="c" * 40,
            license="apache-2.0",
            license_name="Own",
            license_link="LICENSE",
            gated=True,
            private=True,
            language=["de", "en"],
            model_type="llama",
            dtype="bfloat16",
            has_onnx=True,
            weights_sha256="9" * 64,
        ),
        layers=[LayerDecision(i, 1.5 * i, i not in (1, 3), "kept" if i not in (1, 3) else "removed") for i in range(5)],
        removed=[1, 3],
        ratio=0.4,
        parameters=BeforeAfter(1000, 700),
        bytes=BeforeAfter(2000, 1400),
        metric="gradient",
        schedule="oneshot",
        calibration=CalibrationRecord("a, b", 32, 16384, 512, "f" * 64, 8, 8, [TextSource("a", "0" * 64, 16)]),
        compensation=CompensationRecord(
            True, "weight", 4, 0.03, 12.5, 3.0, 2.5, "lower", [0, 2, 4], [0.0, 1.0, 2.0], [0.0, 0.1, 0.2],
            [Trial(4, "weight", 0.03, 2.5), Trial(4, "projection", 0.003, 2.75)],
        ),
        seed=7,
        candidates=[Candidate("gradient", [1, 3], 3.0), Candidate("taylor", [2, 3], 3.5)],
        verification=VerificationRecord(True, 1e-6, 64, True),
        evaluation=EvaluationRecord(
            "perplexity", 12.0, 15.0, 20.0, "a",
            [TextPerplexity("a", "held out", 12, 6144, 512, "1" * 64, 12.0, 20.0, 15.0, [1.1, 1.4])],
        ),
        artifacts=[
            Artifact("model.safetensors", 1400, "2" * 64, "safetensors"),
            Artifact("onnx/model.onnx", 2900, "3" * 64, "onnx", Parity(1e-5, 2e-5, True, 48)),
        ],
        target="acme/small",
        space="acme/small-compare",
        dtype="bfloat16",
        versions={"torch": "2.13.0"},
        timings={"score": 11.5},
        hardware="x86_64, 2 CPU cores",
        heal=HealRecord(True, 40, 3e-4, 2.5, 2.25, "lower", [0, 2, 4], [HealCheck(40, 0.125, 2.25)]),
        settings={"ratio": 0.4, "drop": None, "calibration": ["a", "b"], "seed": 7},
        measured=Measured(
            "9.9.9", "4" * 64, "größe", "c" * 40, "5" * 64, BeforeAfter(2000, 1400), "float32",
            texts=[
                MeasuredText(
                    "b", "6" * 64, 4, 2048, 512, 12.0, 15.0, [1.1, 1.4], 0.5, [0.4, 0.6], 0.25, [0.2, 0.3],
                    Contamination(1, 4, "", ["a"]),
                )
            ],
            tasks=[
                MeasuredTask(
                    "boolq", "2.0", "aps/super_glue", "boolq", "validation", "boolq.validation.jsonl", 20, 500,
                    "7" * 64, "acc", [MeasuredMetric("acc", 0.5, 0.25, [-0.5, 0.0], 50.0)],
                )
            ],
            files=[MeasuredFile("onnx/model.onnx", 2900, "3" * 64, "8" * 64, [FilePerplexity("b", 15.5, [1.0, 1.1])])],
            speed=[MeasuredSpeed("pruned", "PyTorch", 8, Rate(2.0, 1.0, 3.0), Rate(5.0, 4.0, 6.0))],
            samples=[Sample("Who?", "Me.", "You.")],
            harness="0.4.13", settings={"rows": 4}, versions={"torch": "2.13.0"}, hardware="x86_64",
        ),
        measured_note="An older one was dropped",
    )  # fmt: skip


def test_round_trip(full: RunRecord, tmp_path: Path) -> None:
    defaults = {e.name: e.default for e in dataclasses.fields(full) if e.default is not dataclasses.MISSING}
    assert all(getattr(full, name) != value for name, value in defaults.items())
    full.write(tmp_path)
    back = RunRecord.read(tmp_path)
    assert back == full
    assert back.measured is not None and back.measured.texts[0].contamination == Contamination(1, 4, "", ["a"])
    assert isinstance(back.artifacts[1].parity, Parity) and isinstance(back.base, Base)
    assert (back.layers_before, back.layers_after) == (5, 3)
    text = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert "größe" in text and text.endswith("}\n")
    back.write(tmp_path)
    assert (tmp_path / FILE_NAME).read_text(encoding="utf-8") == text


def test_optional_parts_may_be_absent(full: RunRecord, tmp_path: Path) -> None:
    bare = dataclasses.replace(full, verification=None, evaluation=None, target=None, space=None, candidates=[])
    bare.write(tmp_path)
    assert RunRecord.read(tmp_path) == bare
    data = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    del data["verification"], data["timings"], data["hardware"]
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    assert RunRecord.read(tmp_path) == dataclasses.replace(bare, timings={}, hardware="")


def test_keys_of_a_newer_version_are_ignored_at_every_depth(full: RunRecord, tmp_path: Path) -> None:
    data = json.loads(to_json(full))
    data["future"] = {"anything": 1}
    data["base"]["future"] = True
    data["layers"][0]["future"] = None
    data["evaluation"]["texts"][0]["future"] = []
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    assert RunRecord.read(tmp_path) == full


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_refused(value: float, full: RunRecord, tmp_path: Path) -> None:
    full.write(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    for broken in (
        dataclasses.replace(full, ratio=value),
        dataclasses.replace(full, candidates=[Candidate("gradient", [1], value)]),
        dataclasses.replace(full, timings={"score": value}),
    ):
        with pytest.raises(ValueError):
            broken.write(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_missing_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not made by gradmap-hub") as caught:
        RunRecord.read(tmp_path)
    assert "gradmap-hub prune" in (caught.value.hint or "")


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: json.dumps(data)[:-20],
        lambda data: "",
        lambda data: "[]",
        lambda data: "null",
        lambda data: json.dumps(without(data, "removed")),
        lambda data: json.dumps({**data, "base": "acme/model"}),
        lambda data: json.dumps({**data, "removed": 3}),
        lambda data: json.dumps({**data, "layers": [1, 2]}),
    ],
    ids=["cut short", "empty", "list", "null", "no removed", "base is text", "removed is a number", "flat layers"],
)
def test_what_is_not_a_record_is_refused(damage: Any, full: RunRecord, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(damage(json.loads(to_json(full))), encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be read"):
        RunRecord.read(tmp_path)
