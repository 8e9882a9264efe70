"""What a repeated run takes from a record, what is refused, and which texts are the recorded ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import CalibrationError, SourceError, UsageError
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.pipeline.reproduce import Repeat, push_config_from, repeat
from gradmap_hub.record import RunRecord

NO_HUB = cast("Any", None)  # nothing here asks one
DATA_SET = f"acme/texts:small/train@{'d' * 40}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a record in it, and another one to run in."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


@pytest.fixture
def write(place: Path) -> Callable[..., Path]:
    """Writes a record of a run on the texts `a.txt` ("one"), a data set, and with `b.txt` ("two") for evaluation."""

    def build(settings: dict[str, Any] | None = None, *, without: tuple[str, ...] = (), **base: Any) -> Path:
        full = dataclasses.asdict(PruneConfig(layers=2, seed=7, site="around-gaps")) | {
            "calibration": ["a.txt", DATA_SET],
            "eval_text": ["b.txt"],
        }
        full |= settings or {}
        for name in without:
            del full[name]
        evaluated = {
            "rows": 2, "tokens": 64, "sequence_length": 32, "original": 1.0, "pruned": 2.0, "compensated": 1.5,
            "interval": [],
        }  # fmt: skip
        texts = [
            evaluated | {"name": "a.txt", "kind": "calibration (held out)", "sha256": sha256("one")},
            evaluated | {"name": "b.txt", "kind": "another source", "sha256": sha256("two")},
        ]
        record = {
            "schema_version": 2,
            "gradmap_hub": "0.0.1",
            "command": "gradmap-hub push acme/base --layers 2",
            "name": "small",
            "base": {"name": "acme/base", "repo_id": "acme/base", "revision": "main", "commit": "c" * 40} | base,
            "layers": [{"index": n, "score": 1.0, "kept": n == 0, "reason": ""} for n in range(2)],
            "removed": [1],
            "ratio": 0.4,
            "parameters": {"before": 2, "after": 1},
            "bytes": {"before": 2, "after": 1},
            "metric": "gradient",
            "schedule": "oneshot",
            "calibration": {
                "source": "", "samples": 4, "tokens": 64, "sequence_length": 32, "sha256": "e" * 64,
                "texts": [
                    {"name": "a.txt", "sha256": sha256("one"), "rows": 2},
                    {"name": DATA_SET, "sha256": "f" * 64, "rows": 2},
                ],
            },
            "compensation": {"applied": False},
            "seed": 7,
            "evaluation": {
                "metric": "perplexity", "before": 1.0, "after": 1.0, "uncompensated": 1.0, "data": "", "texts": texts
            },
            "settings": full,
        }  # fmt: skip
        path = place / "gradmap.json"
        path.write_text(json.dumps(record))
        return path

    return build


def again(path: Path, given: dict[str, Any] | None = None, *, model: str | None = None) -> Repeat:
    return repeat(str(path), model=model, revision=None, given=given or {}, hub=NO_HUB)


def test_everything_is_taken(place: Path, write: Callable[..., Path]) -> None:
    record = write()
    (place / "a.txt").write_text("one")
    (place / "here" / "b.txt").write_text("two")
    found = again(record)
    assert (found.model, found.revision) == ("acme/base", "c" * 40)
    assert found.prune == PruneConfig(
        layers=2, seed=7, site="around-gaps", calibration=(str(place / "a.txt"), DATA_SET),
        eval_text=(str(place / "here" / "b.txt"),),
    )  # fmt: skip
    assert found.expected.commit == "c" * 40 and found.expected.rows_sha256 == "e" * 64
    assert "gradmap-hub 0.0.1 (here" in found.remarks[0]
    assert again(place).prune == found.prune  # a folder that holds the record is the same


def test_given_settings_override_the_record(place: Path, write: Callable[..., Path]) -> None:
    record = write()
    (place / "a.txt").write_text("one")
    found = again(record, {"ratio": 0.5, "seed": 1, "eval_text": ()})
    assert (found.prune.ratio, found.prune.layers, found.prune.seed, found.prune.eval_text) == (0.5, None, 1, ())
    assert found.expected.rows_sha256 is None and found.expected.commit == "c" * 40
    other = again(record, {"eval_text": ()}, model="acme/other")
    assert other.model == "acme/other" and other.revision is None
    assert other.expected.commit is None and other.expected.rows_sha256 is None


def test_a_text_by_any_name_and_place(place: Path, write: Callable[..., Path]) -> None:
    record = write()
    renamed = place / "renamed.txt"
    renamed.write_text("one")
    found = again(record, {"calibration": (str(renamed), "acme/texts:small/train"), "eval_text": ()})
    assert found.prune.calibration == (str(renamed), DATA_SET)
    with pytest.raises(CalibrationError, match="not made with the text acme/elsewhere"):
        again(record, {"calibration": ("acme/elsewhere",), "eval_text": ()})
    renamed.write_text("changed")
    with pytest.raises(CalibrationError, match=r"renamed\.txt is not the recorded text"):
        again(record, {"calibration": (str(renamed),), "eval_text": ()})


def test_a_text_that_is_not_there(place: Path, write: Callable[..., Path]) -> None:
    record = write()
    with pytest.raises(CalibrationError, match=r"a\.txt of the record is neither next to") as caught:
        again(record)
    assert sha256("one") in str(caught.value.hint)
    (place / "a.txt").write_text("another")
    with pytest.raises(CalibrationError, match=r"a\.txt is not the recorded text"):
        again(record)
    (place / "here" / "a.txt").write_text("one")  # the changed one next to the record is skipped
    with pytest.raises(CalibrationError, match=r"b\.txt of the record is neither") as caught:
        again(record)
    assert "--eval-text" in str(caught.value.hint)


def test_records_that_do_not_say_enough(place: Path, write: Callable[..., Path]) -> None:
    (place / "a.txt").write_text("one")
    with pytest.raises(SourceError, match=r"lacks the setting heal, seed, which gradmap-hub 0\.0\.1"):
        again(write(without=("heal", "seed")))
    assert again(write(without=("seed",)), {"seed": 3, "eval_text": ()}).prune.seed == 3
    with pytest.raises(SourceError, match=r"written by gradmap-hub 0\.0\.1; its setting magic"):
        again(write({"magic": True}))
    path = write()
    data = json.loads(path.read_text())
    del data["settings"]
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="did not record the settings") as caught:
        again(path)
    assert "gradmap-hub push acme/base --layers 2" in str(caught.value.hint)
    path.write_text("[1]")
    with pytest.raises(SourceError, match="cannot be read as a record"):
        again(path)


@pytest.mark.parametrize(
    "settings", [{"samples": "many"}, {"calibration": "a.txt"}, {"calibration": [1]}, {"ratio": []}, {"layers": 0}]
)
def test_invalid_settings(place: Path, write: Callable[..., Path], settings: dict[str, Any]) -> None:
    (place / "a.txt").write_text("one")
    with pytest.raises((SourceError, UsageError)):
        again(write(settings), {"eval_text": ()})


def changed(path: Path, **values: Any) -> Path:
    """The record with other values; those of `base` are merged into its own."""
    data = json.loads(path.read_text())
    values["base"] = data["base"] | values.get("base", {})
    path.write_text(json.dumps(data | values))
    return path


def artifacts(*formats: str) -> list[dict[str, Any]]:
    return [{"format": name, "path": name, "bytes": 1, "sha256": "0" * 64} for name in formats]


def push_of(path: Path, **given: Any) -> PushConfig:
    return push_config_from(again(path, {"eval_text": ()}), given)


def test_a_push_is_repeated_as_published(place: Path, write: Callable[..., Path]) -> None:
    (place / "a.txt").write_text("one")
    unpublished = push_of(changed(write(), artifacts=artifacts("safetensors", "onnx", "int8")))
    assert (unpublished.onnx, unpublished.quantize, unpublished.space) == (True, (), "auto")  # the defaults
    record = changed(write(), target="ada/small", artifacts=artifacts("safetensors", "int4", "onnx", "int8"))
    found = push_of(record)
    assert (found.onnx, found.quantize, found.space) == (True, ("int8", "int4"), "none")
    assert (found.model, found.revision) == ("acme/base", "c" * 40)
    repeated = again(record, {"eval_text": ()})
    assert (found.prune, found.repeats) == (repeated.prune, repeated.expected)
    assert (found.to, found.output, found.public) == (None, None, False)  # never the record's
    assert push_of(changed(record, space="ada/small-compare")).space == "auto"
    other = push_of(record, quantize=("fp16",), space=True, to="club/x", prune=PruneConfig(layers=1))
    assert (other.quantize, other.space, other.to, other.prune.layers) == (("fp16",), "auto", "club/x", 1)
    with pytest.raises(UsageError, match="--quantize writes ONNX files"):
        push_of(record, onnx=False)
    with pytest.raises(TypeError, match="model"):
        push_of(record, model="acme/other")  # which `repeat` decides
    assert not push_of(changed(record, artifacts=artifacts("safetensors"))).onnx


def test_the_licence_of_the_publisher_is_repeated(place: Path, write: Callable[..., Path]) -> None:
    (place / "a.txt").write_text("one")
    named = {"license": "other", "license_name": "Our own", "license_link": "LICENSE"}
    stated = push_of(changed(write(), base=named | {"license_source": "publisher"}))
    assert (stated.license, stated.license_name, stated.license_link) == ("other", "Our own", "LICENSE")
    assert push_of(changed(write(), base={"license": "mit", "license_source": "original"})).license is None
    given = push_of(changed(write(), base=named | {"license_source": "publisher"}), license="mit", license_link="x")
    assert (given.license, given.license_name, given.license_link) == ("mit", "Our own", "x")


def test_a_record_cannot_name_files_elsewhere(place: Path, write: Callable[..., Path]) -> None:
    """Of a name only the last part is used."""
    (place / "secret.txt").write_text("one")
    record = write({"calibration": ["../secret.txt"]})
    with pytest.raises(SourceError, match="does not contain the sha256"):
        again(record, {"eval_text": ()})
    hidden = write(repo_id="../here", name="../here")
    (place / "a.txt").write_text("one")
    with pytest.raises(SourceError, match="is not a valid Hub id"):
        again(hidden, {"eval_text": ()})


def test_local_original(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no commit, so its weights are compared; the result is the same bytes."""
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    config = PruneConfig(
        layers=2, calibration=(str(text_file),), samples=4, seq_len=32, eval_rows=2, compensation="projection"
    )
    prune(str(tiny_folder), tmp_path / "first", config)
    assert RunRecord.read(tmp_path / "first").base.weights_sha256
    with pytest.raises(UsageError, match="give its path as MODEL"):
        again(tmp_path / "first", {"calibration": (str(text_file),)})
    found = again(tmp_path / "first", {"calibration": (str(text_file),)}, model=str(tiny_folder))
    # "auto" is recorded as the value it had.
    assert found.prune == dataclasses.replace(config, device="cpu", compute="float32")
    prune(found.model, tmp_path / "second", found.prune, repeats=found.expected)
    weights = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    changed = load_file(tiny_folder / "model.safetensors")
    save_file({name: value * 1.5 for name, value in changed.items()}, tiny_folder / "model.safetensors")
    with pytest.raises(SourceError, match="sha256 of its weights differs"):
        prune(found.model, tmp_path / "third", found.prune, repeats=found.expected)
