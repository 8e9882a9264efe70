"""`sweep`: the numbers are those of `prune`, each is computed once, and what is written says them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gradmap_hub.cli.app import app
from gradmap_hub.cli.options import HOW, HOW_MUCH, PruneOptions, prune_options
from gradmap_hub.config import PruneConfig, SweepConfig, paper_preset
from gradmap_hub.errors import CalibrationError, OutputExists, UsageError
from gradmap_hub.models.safetensors_files import read_safetensors_header
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.pipeline.sweep import sweep
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning import compensation
from gradmap_hub.sweeping.record import SweepRecord
from gradmap_hub.sweeping.report import PLOT_FILE, TABLE_FILE

LAYERS = 5
QUICK: dict[str, Any] = {"ratio": 0.5, "samples": 6, "seq_len": 32, "eval_rows": 3}
ONE, TWO, THREE = (f"Without {count} of {LAYERS} layers: " for count in (1, 2, 3))
OF_A_RATIO = ["Choosing layers on held-out sequences", "Compensating the drift", "Size", "Measuring perplexity"]


class Watch(SilentReporter):
    """Notes what was computed and what was on disk; Ctrl-C when the stage `stop_at` begins."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.computed: list[str] = []
        self.reused: list[str] = []
        self.notes: list[str] = []
        self._stop_at, self._title = stop_at, ""

    def start(self, title: str) -> None:
        if title == self._stop_at:
            raise KeyboardInterrupt
        self._title = title

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        (self.reused if reused else self.computed).append(self._title)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def every_correction_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has little to gain on text; corrections that are in the weights are what is tested here."""
    monkeypatch.setattr(compensation, "lowers", lambda _before, _after: True)


@pytest.fixture
def other_text(tmp_path: Path, text_of: Callable[..., str]) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(text_of(20_000, seed=3), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_folder: Path, text_file: Path, other_text: Path, tmp_path: Path) -> SweepConfig:
    prune = PruneConfig(**QUICK, calibration=(str(text_file),), eval_text=(str(other_text),))
    return SweepConfig(str(tiny_folder), (0.2, 0.4), prune, output=tmp_path / "swept", speed=False)


def swept(config: SweepConfig, *, watch: Watch | None = None, **changes: Any) -> tuple[SweepRecord, Watch]:
    """A sweep and what it computed. `changes`: of the sweep's fields, or of those of how it prunes."""
    watch = watch or Watch()
    own = {name: changes.pop(name) for name in list(changes) if name in {f.name for f in dataclasses.fields(config)}}
    config = dataclasses.replace(config, **own, prune=dataclasses.replace(config.prune, **changes))
    return sweep(config, reporter=watch)[0], watch


def tensor_bytes(folder: Path) -> int:
    header = read_safetensors_header(folder / "model.safetensors")
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "changes"),
    [
        ("float32", {}),
        # What is put in for the measurement is rounded as the checkpoint would hold it.
        pytest.param("bfloat16", {"compute": "float32"}, marks=pytest.mark.slow),
        pytest.param("float32", {"heal": "3"}, marks=pytest.mark.slow),
        pytest.param("float32", {"low_memory": True}, marks=pytest.mark.slow),
        pytest.param("float32", {"schedule": "iterative", "compensation": "projection"}, marks=pytest.mark.slow),
    ],
    ids=["default", "rounded", "healed", "low-memory", "iterative"],
)
def test_the_second_ratio_equals_prune(
    stored: str,
    changes: dict[str, Any],
    config: SweepConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second: whatever the first left in the model would show."""
    from gradmap_hub.healing import heal

    monkeypatch.setattr(heal, "lowers", lambda _before, _after: True)
    if stored == "bfloat16":
        as_bfloat16(Path(config.model))
    record, _ = swept(config, **changes)
    written = prune(config.model, tmp_path / "pruned", dataclasses.replace(config.prune, **(changes | {"ratio": 0.4})))
    point = record.points[1]
    assert point.compensation.applied and point.compensation.corrections == written.compensation.corrections
    assert (point.removed, point.metric, point.candidates) == (written.removed, written.metric, written.candidates)
    if changes.get("heal"):
        assert point.heal is not None and written.heal is not None
        assert dataclasses.replace(point.heal, seconds=0) == dataclasses.replace(written.heal, seconds=0)
    else:
        assert point.heal is None is written.heal
    assert point.evaluation.texts and written.evaluation is not None
    for found, wanted in zip(point.evaluation.texts, written.evaluation.texts, strict=True):
        assert (found.name, found.kind, found.sha256) == (wanted.name, wanted.kind, wanted.sha256)
        for name in ("original", "pruned", "compensated", "interval"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-6)
        assert abs(found.compensated / found.pruned - 1) > 1e-4  # or nothing would have been put in
    assert point.parameters == written.parameters and point.bytes.before == written.bytes.before
    assert point.bytes.after == tensor_bytes(tmp_path / "pruned")
    assert record.calibration == written.calibration
    assert record.base.weights_sha256 == written.base.weights_sha256 is not None


def as_bfloat16(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def test_the_overall_ratio_is_over_all_rows(config: SweepConfig) -> None:
    """Both texts have as many rows, so it is the geometric mean of theirs."""
    record, _ = swept(config, ratios=(0.4,))
    [point] = record.points
    first, second = (text.compensated / text.original for text in point.evaluation.texts)
    assert [text.rows for text in point.evaluation.texts] == [3, 3]
    assert point.perplexity == pytest.approx((first * second) ** 0.5, rel=1e-9)
    assert point.interval[0] < point.perplexity < point.interval[1]
    first, second = (text.pruned / text.original for text in point.evaluation.texts)
    assert point.uncorrected == pytest.approx((first * second) ** 0.5, rel=1e-9)


@pytest.mark.long  # four sweeps
def test_each_is_computed_once(config: SweepConfig) -> None:
    first, watch = swept(config)
    shared = [f"Fetching {Path(config.model).name}", "Scoring layers", "Measuring the original"]
    text = "Reading calibration text"  # is read each time
    assert watch.computed == [text, *shared, *(ONE + title for title in OF_A_RATIO), *(TWO + t for t in OF_A_RATIO)]
    again, watch = swept(config)
    assert watch.computed == [text] and again == first
    # one more ratio, and fewer
    more, watch = swept(config, ratios=(0.6, 0.2, 0.4))
    assert watch.computed == [text, *(THREE + title for title in OF_A_RATIO)]
    assert [point.ratios for point in more.points] == [[0.2], [0.4], [0.6]] and more.points[:2] == first.points
    fewer, watch = swept(config, ratios=(0.6,))
    assert watch.computed == [text] and fewer.points == more.points[2:]


@pytest.mark.slow  # five sweeps
def test_what_changes_is_computed_again(config: SweepConfig, other_text: Path, text_of: Callable[..., str]) -> None:
    text = "Reading calibration text"
    swept(config)
    # other measurements do not choose or correct anew
    timed, watch = swept(config, speed=True)
    assert watch.computed == [text, f"{ONE}Timing against the original", f"{TWO}Timing against the original"]
    assert all(point.speed is not None for point in timed.points)
    _, watch = swept(config, dtype="bfloat16")
    measured = [label + title for label in (ONE, TWO) for title in OF_A_RATIO[2:]]
    assert watch.computed == [text, *measured]
    other_text.write_text(text_of(20_000, seed=4), encoding="utf-8")
    _, watch = swept(config)
    assert watch.computed == [text, "Measuring the original", *measured]
    # other rows do
    _, watch = swept(config, samples=8)
    assert watch.computed[1:3] == ["Scoring layers", "Measuring the original"] and len(watch.computed) == 11


@pytest.mark.slow  # test_each_is_computed_once goes on after a whole sweep; tests/test_stage_cache.py after part of one
@pytest.mark.parametrize("stop_at", [f"{TWO}Compensating the drift", f"{TWO}Measuring perplexity"])
def test_an_interruption_leaves_what_is_finished(stop_at: str, config: SweepConfig, tmp_path: Path) -> None:
    whole, everything = swept(config, output=tmp_path / "in-one-go")
    assert config.output is not None
    with pytest.raises(KeyboardInterrupt):
        swept(config, watch=Watch(stop_at))
    half = SweepRecord.read(config.output)
    assert [point.removed for point in half.points] == [whole.points[0].removed]
    assert half.ratios == [0.2, 0.4] and half.recommendation.ratio is None
    assert "Not finished: 0.4 " in (config.output / TABLE_FILE).read_text(encoding="utf-8")
    assert not (config.output / PLOT_FILE).exists()
    found, watch = swept(config)
    assert (config.output / PLOT_FILE).exists()
    assert "Not finished" not in (config.output / TABLE_FILE).read_text(encoding="utf-8")
    titles = everything.computed
    assert watch.computed == ["Reading calibration text", *titles[titles.index(stop_at) :]]
    assert without_seconds(found) == without_seconds(whole)


def without_seconds(record: SweepRecord) -> SweepRecord:
    points = [dataclasses.replace(point, seconds={}) for point in record.points]
    return dataclasses.replace(record, seconds={}, points=points)


def test_an_interruption_before_anything_is_kept_leaves_no_folder(config: SweepConfig, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        swept(config, watch=Watch("Reading calibration text"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_ratios_that_come_to_the_same_are_measured_once(config: SweepConfig) -> None:
    record, watch = swept(config, ratios=(0.4, 0.23, 0.2, 0.4))
    assert [(point.ratios, len(point.removed)) for point in record.points] == [([0.2, 0.23], 1), ([0.4], 2)]
    assert record.ratios == [0.2, 0.23, 0.4] and sum("Compensating" in title for title in watch.computed) == 2


def test_what_is_written(config: SweepConfig) -> None:
    """sweep.json holds the record, sweep.md every number of it that matters, sweep.png a picture."""
    from PIL import Image

    record, _ = swept(config, ratios=(0.2, 0.4, 0.6), speed=True, max_loss=1e6)
    assert config.output is not None
    assert SweepRecord.read(config.output) == record
    assert {path.name for path in config.output.iterdir()} == {"sweep.json", TABLE_FILE, PLOT_FILE}
    text = (config.output / TABLE_FILE).read_text(encoding="utf-8")
    for point in record.points:
        assert point.speed is not None
        for words in (
            f"| {point.ratios[0]:g} | {point.layers.after} | ",
            f"| x{point.perplexity:.2f} [{point.interval[0]:.2f}, {point.interval[1]:.2f}] | ",
            f"x{point.speed.decode.ratio:.2f} [{point.speed.decode.spread[0]:.2f}, ",
            f"without layers {', '.join(map(str, point.removed))} ({point.metric})",
        ):
            assert words in text
    assert record.recommendation.ratio == 0.6
    assert f"\n{record.recommendation.push}\n" in text and "Recommended: 0.6, " in text
    with Image.open(config.output / PLOT_FILE) as image:
        image.load()
        assert image.size == (1200, 840)


def test_low_memory_measures_no_speed_and_says_so(config: SweepConfig) -> None:
    record, watch = swept(config, low_memory=True, speed=True, ratios=(0.2,))
    assert record.points[0].speed is None and "--low-memory" in record.no_speed
    assert [note for note in watch.notes if "Speed is not measured" in note]
    assert config.output is not None
    assert "Speed was not measured: with --low-memory" in (config.output / TABLE_FILE).read_text(encoding="utf-8")


# -- refused ---------------------------------------------------------------------------------------------------------


def test_what_is_in_the_folder_is_left_alone(
    config: SweepConfig, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    assert config.output is not None
    swept(config, ratios=(0.2,))
    other = folder_of(tmp_path / "another", num_hidden_layers=3)
    before = {path: path.read_bytes() for path in config.output.iterdir()}
    with pytest.raises(OutputExists, match="holds a sweep of tiny"):
        swept(config, model=str(other))
    assert {path: path.read_bytes() for path in config.output.iterdir()} == before
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match="not empty"):
        swept(config, output=notes)
    with pytest.raises(OutputExists, match="is a file"):
        swept(config, output=notes / "mine.txt")
    assert [path.name for path in notes.iterdir()] == ["mine.txt"] and not (tmp_path / "notes.work").exists()


def test_texts_that_are_not_there(config: SweepConfig, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        swept(config, eval_text=(str(tmp_path / "nowhere.txt"),))


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["sweep", *map(str, words)], catch_exceptions=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--ratios", "0.2,1"), "--ratios"),
        (("--ratios", "0"), "--ratios"),
        (("--ratios", "0.1,half"), "--ratios"),
        (("--ratios", "nan"), "--ratios"),
        (("--ratios", ","), "--ratios"),
        (("--max-loss", "-1"), "--max-loss"),
        (("--max-loss", "nan"), "--max-loss"),
        (("--metric", "magic"), "--metric"),
        (("--preset", "magic"), "--preset"),
        (("--heal", "2X"), "--heal"),
    ],
)
def test_refused_in_one_line_before_the_model_is_looked_for(words: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = invoke(tmp_path / "no-such-model", tmp_path / "out", *words)
    assert isinstance(done.exception, UsageError)
    assert named in done.exception.message and "\n" not in done.exception.message
    assert not list(tmp_path.iterdir())


def test_ratios_that_a_library_gives() -> None:
    for ratios in ((), (0.1, 1.0), (float("nan"),)):
        with pytest.raises(UsageError, match="--ratios"):
            SweepConfig("m", ratios)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_ends_with_the_push(config: SweepConfig, text_file: Path) -> None:
    assert config.output is not None
    words = [config.model, config.output, "--ratios", "0.2,0.4", "-c", text_file, "--samples", "6", "--seq-len", "32",
             "--eval-rows", "3", "--no-speed", "--quiet"]  # fmt: skip
    shown = invoke(*words, "--max-loss", "1e6")
    assert shown.exit_code == 0, shown.output
    record = SweepRecord.read(config.output)
    lines = shown.stdout.splitlines()
    assert lines[-1] == record.recommendation.push
    assert lines[-1].startswith(f"gradmap-hub push {config.model} --ratio 0.4 --calibration {text_file}")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [row[0] for row in rows] == ["0", "0.2", "0.4"] and [row[1] for row in rows] == ["5", "4", "3"]
    assert rows[2][4].startswith(f"x{record.points[1].perplexity:.2f} [")
    parsed = invoke(*words, "--json")
    answer = json.loads(parsed.stdout)
    assert answer["folder"] == str(config.output) and answer["recommendation"]["ratio"] is None
    assert "needs at least 3 ratios" in answer["recommendation"]["reason"]
    assert answer["points"][1]["perplexity"] == record.points[1].perplexity


PUSHED = [
    PruneConfig(ratio=0.2),
    PruneConfig(ratio=0.2, calibration=("a b.txt", "it's.txt"), eval_text=("c.txt",), samples=8, low_memory=True),
    PruneConfig(
        ratio=0.2, metric="taylor", schedule="iterative", compensation="none", dtype="float16", seed=3, heal="0"
    ),
    PruneConfig(ratio=0.2, heal="9", device="cpu", compute="float32", seq_len=64, eval_rows=5),
    paper_preset(PruneConfig(ratio=0.2)),
    paper_preset(PruneConfig(ratio=0.2, samples=9)),
]


@pytest.mark.parametrize("prune", PUSHED)
def test_the_push_that_is_printed_prunes_as_the_sweep_did(prune: PruneConfig) -> None:
    line = SweepConfig("some where/model", prune=prune, revision="v1").push_command(0.2)
    typed: list[tuple[str, str | None, PruneConfig]] = []
    other = typer.Typer()

    @other.command()
    @prune_options(*HOW_MUCH, *HOW)
    def push(model: str, *, revision: str | None = None, options: PruneOptions) -> None:
        typed.append((model, revision, options.config()))

    program, command, *words = shlex.split(line)
    done = CliRunner().invoke(other, words)
    assert done.exit_code == 0, done.output
    assert (program, command) == ("gradmap-hub", "push") and typed == [("some where/model", "v1", prune)]


# -- speed -----------------------------------------------------------------------------------------------------------


def test_speed_tells_the_two_apart(model_of: Callable[..., Any], random_rows: Callable[..., Any]) -> None:
    """A pause in every call of the `pruned` model makes it slower; rounds take turns, and the cache is used."""
    import time

    from gradmap_hub.evaluation.speed import against_original

    model, calls = model_of("llama"), []
    inside = False

    @contextmanager
    def pruned() -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    def note(_module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        calls.append((inside, (args[0] if args else kwargs["input_ids"]).shape[1]))
        if inside:
            time.sleep(0.05)

    model.register_forward_pre_hook(note, with_kwargs=True)
    done: list[int] = []
    found = against_original(
        model, pruned, random_rows(1, 24)[0].tolist(), new_tokens=4, rounds=3, done=lambda: done.append(len(calls))
    )
    assert (found.prompt_tokens, found.new_tokens, found.rounds, found.device) == (24, 4, 3, "cpu")
    for rate in (found.prefill, found.decode):
        assert rate.ratio < 0.8 and rate.pruned < rate.original and rate.spread[0] <= rate.ratio <= rate.spread[1] < 0.9
    assert found.decode.pruned < 1 / 0.05 and found.prefill.pruned < 24 / 0.05
    timed = calls[-3 * 2 * 5 :]
    assert [length for _, length in timed] == [24, 1, 1, 1, 1] * 6
    assert [side for side, _ in timed[::5]] == [False, True, True, False, False, True] and len(done) == 8
