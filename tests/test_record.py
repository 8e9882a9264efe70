"""gradmap.json: everything in, everything out, tolerant of newer versions, intolerant of what is not a number."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import jsonschema_rs  # comes with schemathesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradmap_hub.comparison import COMPARE
from gradmap_hub.errors import GradmapError, SourceError
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
from gradmap_hub.reading import FieldError, from_json
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

ROOT = Path(__file__).resolve().parents[1]


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
        settings={"ratio": 0.4, "drop": None, "calibration": ["a", "b"], "seed": 7, "schedule": "oneshot"},
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
    with pytest.raises(SourceError, match="is not a finished folder of gradmap-hub") as caught:
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


# -- records that somebody else wrote ----------------------------------------------------------------------------------

NESTED = "[" * 10_000 + "]" * 10_000
FIELDS: dict[str, tuple[str, Any, str]] = {
    "name": ("name", 5, "name is 5; a string is expected"),
    "command": ("command", None, "command is null; a string is expected"),
    "metric": ("metric", ["gradient"], "metric is a list of length 1; a string is expected"),
    "parameters": ("parameters", None, "parameters is null; an object is expected"),
    "nothing to divide by": ("parameters.before", 0, "parameters.before is 0; an integer, 1 or more, is expected"),
    "negative": ("bytes.after", -1, "bytes.after is -1; an integer, 0 or more"),
    "fraction": ("bytes.after", 1.5, "bytes.after is 1.5; an integer, 0 or more"),
    "true": ("seed", True, "seed is true; an integer is expected"),
    "10^400": ("bytes.before", 10**400, "an integer in it has 401 digits"),
    "layers": ("layers", None, "layers is null; a list is expected"),
    "layer": ("layers.0.score", "high", r"layers\[0\].score is 'high'; a number is expected"),
    "calibration": ("calibration", None, "calibration is null; an object is expected"),
    "tokens": ("calibration.tokens", "x", "calibration.tokens is 'x'; an integer, 0 or more, is expected"),
    "perplexity 0": ("evaluation.texts.0.original", 0, r"evaluation.texts\[0\].original is 0; a number above 0"),
    "perplexity of a file": ("artifacts.1.parity", [], r"artifacts\[1\].parity is a list of length 0; an object"),
    "1e999": ("evaluation.after", math.inf, "Infinity is not a JSON number"),
    "NaN": ("ratio", math.nan, "NaN is not a JSON number"),
    "half a character": ("name", "a\ud800", "is not Unicode"),
    "half a character in settings": ("settings.calibration", ["\udfff"], "is not Unicode"),
    "settings": ("settings", [], "settings is a list of length 0; an object is expected"),
    "settings of texts": ("settings.calibration", 7, "settings.calibration is 7; a list is expected"),
    "settings of a number": ("settings.seed", "7", "settings.seed is '7'; an integer is expected"),
    "settings of a choice": ("settings.schedule", "never", "is 'never'; one of oneshot, iterative is expected"),
    "path above": ("artifacts.0.path", "../x", r"artifacts\[0\].path is '../x'; a path inside the folder"),
    "path in the middle": ("artifacts.0.path", "onnx/../../x", "a path inside the folder is expected"),
    "absolute": ("artifacts.0.path", "/etc/passwd", "a path inside the folder is expected"),
    "path of Windows": ("artifacts.0.path", "C:\\x", "a path inside the folder is expected"),
    "path with a line feed": ("artifacts.0.path", "a\nb", "a path inside the folder is expected"),
    "path twice": ("artifacts.0.path", "onnx/model.onnx", "artifacts list a path twice"),
    "measured path": ("measured.files.0.path", "../../x", r"measured.files\[0\].path is '../../x'"),
    "interval": ("measured.texts.0.interval", [1.0], r"texts\[0\].interval is a list of length 1; a list of two"),
    "no metric": ("measured.tasks.0.main", "none", r"measured.tasks\[0\].main names no metric"),
    "no text": ("measured.texts", [], "measured.texts is empty"),
    "all removed": ("removed", [0, 1, 2, 3, 4], "removed repeats a layer, names one that does not exist, or names all"),
    "removed twice": ("removed", [1, 1], "removed repeats a layer, names one that does not exist, or names all"),
    "removed that is kept": ("removed", [1, 2], "layers disagree with removed"),
    "a layer that is not there": ("layers.4.index", 7, "layers are not numbered from 0"),
    "a site that is not there": ("compensation.site", 99, "names a layer that does not exist"),
    "shift": ("compensation.shift", [], "compensation.shift_layers is not as long"),
    "healed without layers": ("heal.layers", [], "heal.layers is empty"),
    "versions": ("versions.torch", 2, "versions.torch is 2; a string is expected"),
}  # fmt: skip


def changed(data: Any, where: str, value: Any) -> Any:
    """The decoded record with another value at a dotted place."""
    head, _, rest = where.partition(".")
    place: Any = int(head) if isinstance(data, list) else head
    data[place] = changed(data[place], rest, value) if rest else value
    return data


@pytest.mark.parametrize("name", FIELDS)
def test_the_error_names_the_field(name: str, full: RunRecord, tmp_path: Path) -> None:
    where, value, words = FIELDS[name]
    data = changed(json.loads(to_json(full)), where, value)
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError, match=words) as caught:
        RunRecord.read(tmp_path)
    assert FILE_NAME in caught.value.message and caught.value.message.isprintable() and caught.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [(NESTED.encode(), "nested too deeply"), (b"\xff\xfe", "not UTF-8"), (b"1" * 5000, "cannot be read as a record"),
     (b'{"name": "x"}', "schema_version is missing; an integer is expected")],
    ids=["deep", "UTF-16", "long number", "one field"],
)  # fmt: skip
def test_no_json_or_no_record(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(SourceError, match=words):
        RunRecord.read(tmp_path)


def test_settings_nested_too_deeply(full: RunRecord, tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    data = json.loads(to_json(full)) | {"settings": {"x": deep}}
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError, match="nested too deeply"):
        RunRecord.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_record_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(SourceError, match="it is not a regular file"):
        RunRecord.read(tmp_path)
    (tmp_path / "folder" / FILE_NAME).mkdir(parents=True)
    with pytest.raises(SourceError, match="it is not a regular file"):
        RunRecord.read(tmp_path / "folder")


ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 99, 10**12, 10**18, 10**400, 0.0, -0.5, 1e-90, 1e90, 1e300, "", "x", "\x1b[31m", "\ud800",
    "../x", "a\nb", "|`<b>", [], [0], [1.0, 2.0], ["x"], [None], [[]], {}, {"x": 1}, {"before": 1, "after": 1},
]  # fmt: skip


def places(data: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within decoded JSON."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [where, *(place for key, value in inner for place in places(value, (*where, key)))]


def mutate(data: Any, where: tuple[Any, ...], change: str, value: Any) -> Any:
    """The decoded JSON with the value at a place replaced, deleted or doubled."""
    if not where:
        return value
    holder = data
    for key in where[:-1]:
        holder = holder[key]
    if change == "replace":
        holder[where[-1]] = value
    elif change == "delete":
        del holder[where[-1]]
    elif isinstance(holder, list):
        holder.insert(where[-1], holder[where[-1]])
    return data


@pytest.fixture(scope="module")
def schemas() -> Any:
    """docs/make_schema.py as a module."""
    path = ROOT / "docs" / "make_schema.py"
    specification = importlib.util.spec_from_file_location("make_schema", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [FILE_NAME, COMPARE])
def test_the_schema_in_the_docs_is_current(name: str, schemas: Any) -> None:
    assert schemas.destination(name).read_text(encoding="utf-8") == schemas.text(name), (
        "run: python docs/make_schema.py"
    )


def test_the_schema_accepts_what_the_reader_does(full: RunRecord, schemas: Any) -> None:
    """A whole record, and five hundred with an odd value somewhere; the reader also checks whether fields agree."""
    validator = jsonschema_rs.Draft202012Validator(schemas.schema(FILE_NAME))
    plain = json.loads(to_json(full))
    assert validator.is_valid(plain)
    draw = random.Random(0)
    # Without what is no JSON that is read, and whole numbers with a point, which are integers to JSON Schema.
    values = [value for value in ODD if value not in (10**400, "\ud800", 1e90, 1e300, [1.0, 2.0]) or value is True]
    values = [value for value in values if not (isinstance(value, float) and value == 0)]
    refused = 0
    for where in draw.choices(places(plain), k=500):
        value = draw.choice(values)
        data = mutate(copy.deepcopy(plain), where, draw.choice(("replace", "delete")), value)
        try:
            from_json(RunRecord, data)
            expected = True
        except FieldError:
            expected = False
        except ValueError:
            continue
        refused += not expected
        assert validator.is_valid(data) == expected, (where, value)
    assert 100 < refused < 450


def test_a_comparison_fits_its_schema(schemas: Any) -> None:
    validator = jsonschema_rs.Draft202012Validator(schemas.schema(COMPARE))
    facts = {
        "title": "Small", "original": {"name": "a", "repo_id": "a/b", "revision": None}, "pruned": {"name": "c"},
        "precisions": [{"name": "int8", "file": "model_int8.onnx", "original": {"stored": "space", "path": "x"}}],
    }  # fmt: skip
    assert validator.is_valid(facts)
    for name, value in (("original", None), ("runtime", 3), ("precisions", [{"name": "int8"}])):
        assert not validator.is_valid(facts | {name: value})


def use(record: RunRecord, folder: Path) -> None:
    """All that shows or follows a record without a model."""
    from rich.console import Console

    from gradmap_hub.card.card import card_text
    from gradmap_hub.card.results import write_results
    from gradmap_hub.cli.tables import record_json, record_view
    from gradmap_hub.pipeline.reproduce import _prune_config, _remarks, _settings, find_calibration
    from gradmap_hub.space.app import _compare, readme_text
    from gradmap_hub.space.kinds import choose_kinds
    from gradmap_hub.space.plan import plan_of

    card_text(record)
    write_results(record, folder)
    plan = plan_of(record)
    if plan.precisions:
        facts = _compare(record, plan, record.target, {})
        json.dumps(facts, allow_nan=False).encode()
        readme_text(facts, "README.md.jinja").encode()
        readme_text(facts, "browser/README.md.jinja", packages=()).encode()
    assert choose_kinds("auto", plan, paid=False, owner="ada").reason
    console = Console(file=io.StringIO())
    for part in record_view(record):
        console.print(part)
    json.dumps(record_json(record, folder), allow_nan=False).encode()
    for attempt in (
        lambda: _prune_config(_settings(record, "gradmap.json", {}), "gradmap.json"),
        lambda: find_calibration(record, [folder]),
        lambda: _remarks(record),
    ):
        with contextlib.suppress(GradmapError):
            attempt()


def _fuzz(full: RunRecord, folder: Path, examples: int) -> None:
    whole = to_json(full)
    everywhere = places(json.loads(whole))
    mutation = st.tuples(
        st.sampled_from(everywhere), st.sampled_from(["replace", "replace", "delete", "double"]), st.sampled_from(ODD)
    )

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(mutation, min_size=1, max_size=2))
    def check(mutations: list[tuple[tuple[Any, ...], str, Any]]) -> None:
        data = json.loads(whole)
        for where, change, value in mutations:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # gone by the first mutation
                data = mutate(data, where, change, copy.deepcopy(value))
        (folder / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
        try:
            record = RunRecord.read(folder)
        except SourceError as error:
            assert error.message.isprintable() and len(error.message) < 300 + len(str(folder))
            return
        record.write(folder)
        use(record, folder)

    check()


def test_a_changed_record_is_refused_or_shown(full: RunRecord, tmp_path: Path) -> None:
    _fuzz(full, tmp_path, 50)


@pytest.mark.slow
def test_thousands_of_changed_records_are_refused_or_shown(full: RunRecord, tmp_path: Path) -> None:
    _fuzz(full, tmp_path, 2_000)
