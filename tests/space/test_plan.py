"""Which precisions a Space has, where its original comes from, and what is never stored with it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gradmap_hub.errors import UnsafeToPublish
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.source import own_exports
from gradmap_hub.pipeline.plan import check_space_folder
from gradmap_hub.pipeline.space import finished_space, remove_space, terms_of
from gradmap_hub.record import Artifact, Base, CalibrationRecord, CompensationRecord, LayerDecision, Quality, RunRecord
from gradmap_hub.space.app import ModelFiles, write_space
from gradmap_hub.space.plan import CPU_BASIC, Hardware, memory_needed, plan_of, plan_space

OPEN = Base("acme/base", "acme/base", "main", "c" * 40, "apache-2.0", dtype="bfloat16")
ALL = ("float32", "int8", "int4")
MILLION = 1_000_000
SMALL = BeforeAfter(540 * MILLION, 425 * MILLION)
# Two models of 8 and 6.5 billion parameters.
LARGE = BeforeAfter(32_000 * MILLION, 26_000 * MILLION)


def base(**changes: Any) -> Base:
    return dataclasses.replace(OPEN, **changes)


@pytest.mark.parametrize(
    ("original", "wanted", "expected"),
    [
        # What the pruned model has is exported of the original too; int8 comes first.
        (base(), ("float32",), ("space", ("float32",), ("float32",))),
        (base(), ALL, ("space", ("int8", "float32", "int4"), ("int8", "float32", "int4"))),
        # What its repository has is not stored again.
        (base(has_onnx=True, exports=["float32"]), ("float32",), ("hub", ("float32",), ())),
        (base(has_onnx=True), ("float32",), ("hub", ("float32",), ())),
        (base(has_onnx=True, exports=["float32"]), ALL, ("space", ("int8", "float32", "int4"), ("int8", "int4"))),
        (base(has_onnx=True, exports=["float32", "int8"]), ("float32", "int8"), ("hub", ("int8", "float32"), ())),
        # A local original has no repository to come from.
        (base(repo_id=None, has_onnx=True), ("float32",), ("space", ("float32",), ("float32",))),
        # What must not be passed on is not: only what its own repository has, or transformers.
        (base(gated=True), ALL, ("transformers", ("float32",), ())),
        (base(private=True), ALL, ("transformers", ("float32",), ())),
        (base(license="llama3"), ALL, ("transformers", ("float32",), ())),
        (base(license=None), ALL, ("transformers", ("float32",), ())),
        (base(gated=True, has_onnx=True), ALL, ("hub", ("float32",), ())),
        (base(license="other", has_onnx=True), ALL, ("hub", ("float32",), ())),
        (base(), (), ("transformers", ("float32",), ())),
    ],
)
def test_where_the_original_comes_from(original: Base, wanted: tuple[str, ...], expected: Any) -> None:
    plan = plan_space(original, wanted, SMALL)
    assert (plan.original, plan.precisions, plan.stored) == expected
    assert plan.runtime == ("transformers" if plan.original == "transformers" else "onnx")


@pytest.mark.parametrize(("change", "word"), [({"gated": True}, "gated"), ({"private": True}, "private"),
                                              ({"license": "llama3"}, "llama3")])  # fmt: skip
def test_the_reason_says_why_it_is_not_stored(change: dict[str, Any], word: str) -> None:
    reason = plan_space(base(**change), ALL, SMALL).reason
    assert word in reason and "not exported again" in reason


def test_what_does_not_fit_is_left_out_and_said() -> None:
    three_billion = BeforeAfter(12_000 * MILLION, 9_500 * MILLION)
    plan = plan_space(OPEN, ALL, three_billion)
    assert plan.precisions == plan.stored == ("int8", "int4")
    assert "float32 needs about" in plan.reason and "cpu-basic has 16 GB" in plan.reason
    # Sizes of real files count more than what was reckoned.
    sizes = {"int8": BeforeAfter(9_000 * MILLION, 8_000 * MILLION)}
    assert plan_space(OPEN, ALL, three_billion, sizes).precisions == ("int4",)


def test_too_large_for_onnx_may_still_fit_in_half_precision() -> None:
    one_and_a_half = BeforeAfter(10_000 * MILLION, 8_000 * MILLION)
    plan = plan_space(OPEN, ("float32",), one_and_a_half)
    assert (plan.original, plan.precisions) == ("transformers", ("bfloat16",))
    assert not plan_space(base(dtype="float32"), ("float32",), one_and_a_half).precisions


def test_an_original_that_only_transformers_5_reads_is_not_given_to_4() -> None:
    plan = plan_space(base(needs_5=True), (), SMALL)
    assert plan.precisions == () and "the original is for transformers 5" in plan.reason
    assert plan_space(base(needs_5=True), ALL, SMALL).precisions  # ONNX files are no matter of transformers


def test_nothing_fits() -> None:
    plan = plan_space(OPEN, ("float32",), LARGE)
    assert plan.precisions == plan.stored == ()
    assert "too large for cpu-basic" in plan.reason and "compare" in plan.reason


def test_the_disk_counts_all_precisions_together() -> None:
    needed = 3_000 * MILLION + 540 * MILLION + 425 * MILLION
    narrow = Hardware("narrow", CPU_BASIC.memory, needed + 300 * MILLION)
    plan = plan_space(OPEN, ("float32", "int8"), SMALL, hardware=narrow)
    assert plan.precisions == ("int8", "float32")
    narrow = Hardware("narrow", CPU_BASIC.memory, needed + 100 * MILLION)
    plan = plan_space(OPEN, ("float32", "int8"), SMALL, hardware=narrow)
    assert plan.precisions == ("int8",) and "float32 needs about" in plan.reason and "of disk" in plan.reason


def test_memory_grows_with_both_models() -> None:
    one = memory_needed(SMALL, "onnx")
    assert one > SMALL.before + SMALL.after
    assert memory_needed(BeforeAfter(SMALL.before + 1000, SMALL.after), "onnx") > one
    assert memory_needed(BeforeAfter(SMALL.before, SMALL.after + 1000), "onnx") > one


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["onnx/model.onnx"], ["float32"]),
        # Others' int8 mostly rounds activations too: not what the pruned model is compared in.
        (["onnx/model.onnx", "onnx/model_int8.onnx", "onnx/model_q4.onnx"], ["float32"]),
        (["onnx/model.onnx", "onnx/model_int8.onnx", "gradmap.json"], ["int8", "float32"]),
        (["model.onnx", "gradmap.json"], []),
    ],
)
def test_which_files_of_the_original_count(files: list[str], expected: list[str]) -> None:
    assert own_exports(dict.fromkeys(files, 1)) == expected


QUALITY = Quality(20.4, 20.0, "other.txt", 4096, "int8, blocks of 32", "genai")


def record(**changes: Any) -> RunRecord:
    artifacts = [
        Artifact("model.safetensors", 440, "0" * 64, "safetensors"),
        Artifact("onnx/model.onnx", 450, "0" * 64, "onnx"),
        Artifact("onnx/model.onnx_data", 50, "0" * 64, "onnx"),
        Artifact("onnx/model_int8.onnx", 130, "0" * 64, "int8", None, QUALITY),
    ]
    made = RunRecord(
        schema_version=2, gradmap_hub="0", command="", name="small", base=OPEN,
        layers=[LayerDecision(index, 1.0, index != 1, "") for index in range(3)], removed=[1], ratio=1 / 3,
        parameters=BeforeAfter(150, 110), bytes=BeforeAfter(600, 440), metric="", schedule="",
        calibration=CalibrationRecord("wiki", 4, 128, 32, "0" * 64), compensation=CompensationRecord(False), seed=0,
        artifacts=artifacts,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_a_finished_run_has_the_precisions_of_its_files() -> None:
    plan = plan_of(record())
    assert plan.precisions == plan.stored == ("int8", "float32")
    large = [dataclasses.replace(entry, bytes=entry.bytes * 20 * MILLION) for entry in record().artifacts]
    assert plan_of(record(artifacts=large, parameters=BeforeAfter(MILLION * 3000, MILLION * 2500))).precisions == (
        "int8",
    )


def test_the_stricter_terms_hold() -> None:
    """`--against` may name another original than the record's, and a repository may have been gated since."""
    found = SimpleNamespace(base=base(repo_id="acme/other", gated=True, license=None))
    assert terms_of(record(), found).gated and terms_of(record(), found).license == "apache-2.0"  # pyright: ignore
    local = SimpleNamespace(base=Base("folder"))
    assert terms_of(record(base=base(gated=True)), local).gated  # pyright: ignore
    assert plan_of(record(), terms_of(record(), found)).stored == ()  # pyright: ignore


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A Space folder with both precisions of an open original."""
    original = tmp_path / "space" / "original"
    original.mkdir(parents=True)
    for name in ("model.onnx", "model_int8.onnx", "model_q4.onnx", "model_int4.onnx_data"):
        (original / name).write_bytes(b"graph")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "_name_or_path": "/home/somebody/model"}))
    plan = plan_of(record())
    originals = {"int8": ModelFiles(170, QUALITY), "float32": ModelFiles(600)}
    write_space(record(), plan, tmp_path / "space", pruned_repo="me/small", companions={"config.json": config},
                originals=originals)  # fmt: skip
    return tmp_path / "space"


def test_compare_json_says_what_is_shown_and_what_it_costs(written: Path) -> None:
    facts = json.loads((written / "compare.json").read_text())
    assert facts["precision"] == "int8"
    cost = {"perplexity": 20.4, "checkpoint_perplexity": 20.0, "text": "other.txt", "tokens": 4096}
    here = {"stored": "space", "path": "original"}
    there = {"stored": "hub", "path": "onnx"}
    assert facts["precisions"] == [
        {"name": "int8", "file": "model_int8.onnx", "original": here | {"bytes": 170, "quality": cost},
         "pruned": there | {"bytes": 130, "quality": cost}},
        {"name": "float32", "file": "model.onnx", "original": here | {"bytes": 600, "quality": None},
         "pruned": there | {"bytes": 500, "quality": None}},
    ]  # fmt: skip
    # And the app reads it.
    read = "from compare import read_facts; from pathlib import Path; facts = read_facts(Path('compare.json'))"
    shown = "print(facts.named('int8').original.cost.perplexity, facts.named('float32').pruned.bytes)"
    done = subprocess.run(
        [sys.executable, "-c", f"{read}; {shown}"], cwd=written, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["20.4", "500"], done.stderr


def test_only_what_is_planned_stays_in_the_space(written: Path) -> None:
    names = {path.name for path in (written / "original").iterdir()}
    assert names == {"model.onnx", "model_int8.onnx", "config.json"}
    assert "somebody" not in (written / "original" / "config.json").read_text()
    write_space(record(), plan_space(base(has_onnx=True), ("float32",), SMALL), written, pruned_repo="me/small")
    assert not (written / "original").exists()


@pytest.mark.parametrize(
    "other",
    [{"target": "me/other"}, {"target": None}, {"base": base(repo_id="acme/other")}, {"base": base(commit="d" * 40)}],
)
def test_only_the_space_of_this_push_is_removed(written: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    of_this = record(target="me/small")
    assert not remove_space(written, dataclasses.replace(of_this, **other)) and written.is_dir()
    (tmp_path / "theirs").mkdir()
    for text in (None, "", "[]", "{}"):
        if text is not None:
            (tmp_path / "theirs" / "compare.json").write_text(text)
        assert not remove_space(tmp_path / "theirs", of_this) and (tmp_path / "theirs").is_dir()
    assert remove_space(written, of_this) and not written.exists()
    assert not remove_space(written, of_this)


def test_a_whole_space_is_used_again_but_not_one_of_an_earlier_version(written: Path, tmp_path: Path) -> None:
    """Which names no files: its app has a table of its own."""
    folder = tmp_path / "small"
    space = written.rename(tmp_path / "small-space")
    both = ("int8", "float32")
    assert finished_space(folder, record(), both) == space
    assert finished_space(folder, record(), (*both, "int4")) is None
    assert finished_space(folder, record(base=base(commit="d" * 40)), both) is None
    (space / "original" / "model_int8.onnx").rename(tmp_path / "model_int8.onnx")
    assert finished_space(folder, record(), both) is None
    (tmp_path / "model_int8.onnx").rename(space / "original" / "model_int8.onnx")
    facts = json.loads((space / "compare.json").read_text())
    for entry in facts["precisions"]:
        del entry["file"]
    (space / "compare.json").write_text(json.dumps(facts))
    assert finished_space(folder, record(), both) is None


@pytest.mark.parametrize("change", [{"gated": True}, {"private": True}, {"license": "llama3"}, {"license": None}])
def test_an_export_that_must_not_be_passed_on_stops_a_publish(written: Path, change: dict[str, Any]) -> None:
    check_space_folder(written, OPEN)
    with pytest.raises(UnsafeToPublish, match=r"original/model.*must not be redistributed"):
        check_space_folder(written, base(**change))


def test_names_in_the_readme_are_shown_literally(tmp_path: Path) -> None:
    odd = record(base=base(name="acme/<b>*x*\x1b[31m\n# title", license="mit\nmodels: evil"))
    write_space(odd, plan_space(base(has_onnx=True), ("float32",), SMALL), tmp_path, pruned_repo="me/_small_")
    text = (tmp_path / "README.md").read_text()
    header, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(header)["license"] == "mit models: evil"
    assert "# &lt;b&gt;\\*x\\* \\[31m \\# title: original and pruned\n" in body
    assert "**acme/&lt;b&gt;\\*x\\*" in body and "**me/\\_small\\_**" in body and "\x1b" not in text
