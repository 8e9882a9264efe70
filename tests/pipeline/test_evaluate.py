"""`evaluate` on a tiny model: numbers against plain loops, what record and card say, what is stale, what is resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

pytest.importorskip("lm_eval")
pytest.importorskip("onnxruntime")

from gradmap_hub.card.card import card_text, write_card
from gradmap_hub.cli import evaluate as command
from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import CalibrationError, MemoryNotMeasured, SourceError, UsageError
from gradmap_hub.evaluation import staleness as freshness
from gradmap_hub.evaluation import texts
from gradmap_hub.evaluation.speed import PYTORCH, peak_memory
from gradmap_hub.evaluation.staleness import folder_sha256, with_earlier, without_stale
from gradmap_hub.folder_config import EvaluateConfig
from gradmap_hub.hub.card_check import check_card
from gradmap_hub.hub.screening import Private, publishable, screen
from gradmap_hub.hub.target import is_ours
from gradmap_hub.layout import sha256_of
from gradmap_hub.measurements import Measured
from gradmap_hub.pipeline.evaluate import evaluate_folder
from gradmap_hub.pipeline.export import export_folder
from gradmap_hub.pipeline.prune import prune
from gradmap_hub.progress import SilentReporter
from gradmap_hub.record import FILE_NAME, RunRecord, to_json
from gradmap_hub.space.app import refresh_compare

pytestmark = pytest.mark.long  # exports, and measures each model in a process of its own
TOKENS, ROWS = 64, 6
TASKS = ("arc_easy", "boolq", "wikitext")


class Heard(SilentReporter):
    """Stages as they finish, and notes. `stop_at`: interrupts the first stage whose title holds it."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.computed: list[str] = []
        self.reused: list[str] = []
        self.notes: list[str] = []
        self._title, self._stop_at = "", stop_at

    def start(self, title: str) -> None:
        self._title = title
        if self._stop_at is not None and self._stop_at in title:
            raise KeyboardInterrupt

    def finish(self, note: str = "", *, reused: bool = False) -> None:
        (self.reused if reused else self.computed).append(self._title)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    folder_of: Callable[..., Path],
    text_of: Callable[..., str],
    task_documents: Path,
) -> SimpleNamespace:
    """A tiny model, pruned and exported, and evaluated once."""
    root = tmp_path_factory.mktemp("evaluate")
    original, folder = folder_of(root / "original"), root / "small"
    calibration = root / "calibration.txt"
    calibration.write_text(text_of(12_000, 10), encoding="utf-8")
    (root / "other.txt").write_text(text_of(40_000, 11), encoding="utf-8")
    (root / "third.txt").write_text(text_of(4_000, 12), encoding="utf-8")
    pruning = PruneConfig(layers=2, calibration=(str(calibration),), samples=8, seq_len=64, eval_rows=2)
    prune(str(original), folder, pruning)
    export_folder(folder, ["onnx"])
    config = EvaluateConfig(
        against=str(original), text=(str(root / "other.txt"), str(root / "third.txt")), tasks=TASKS,
        tasks_from=task_documents, limit=4, seq_len=TOKENS, rows=ROWS,
    )  # fmt: skip
    heard = Heard()
    record = evaluate_folder(folder, config, reporter=heard)
    assert record.measured is not None
    return SimpleNamespace(
        root=root, original=original, folder=folder, config=config, record=record, measured=record.measured, heard=heard
    )


@pytest.fixture
def copy(world: SimpleNamespace, tmp_path: Path) -> Path:
    """The folder and what is beside it, to be damaged."""
    shutil.copytree(world.folder.with_name("small.work"), tmp_path / "small.work")
    return Path(shutil.copytree(world.folder, tmp_path / "small"))


def rows_of(path: Path, tokenizer: Any, most: int) -> torch.Tensor:
    """Blocks that do not overlap, spread over the text."""
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    blocks = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
    return torch.tensor(blocks[:: max(1, len(blocks) // most)][:most])


def plain_perplexity(folder: Path, rows: torch.Tensor) -> float:
    """transformers' own loss, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def test_perplexities_are_those_of_a_plain_loop(world: SimpleNamespace, tokenizer: Any) -> None:
    for text, name in zip(world.measured.texts, ("other.txt", "third.txt"), strict=True):
        rows = rows_of(world.root / name, tokenizer, ROWS)
        assert (text.name, text.rows, text.tokens, text.sequence_length) == (name, ROWS, ROWS * TOKENS, TOKENS)
        assert text.original == pytest.approx(plain_perplexity(world.original, rows), rel=1e-4)
        assert text.pruned == pytest.approx(plain_perplexity(world.folder, rows), rel=1e-4)
        assert text.interval[0] < text.pruned / text.original < text.interval[1]
        assert text.agreement_interval[0] <= text.agreement <= text.agreement_interval[1]
        assert 0 < text.divergence_interval[0] < text.divergence < text.divergence_interval[1]


def test_files_are_measured_by_onnx_runtime_on_the_same_rows(world: SimpleNamespace) -> None:
    (entry,) = world.measured.files
    graph = world.folder / entry.path
    assert (entry.path, entry.sha256, entry.data_sha256) == ("onnx/model.onnx", sha256_of(graph), "")
    assert [found.text for found in entry.perplexity] == ["other.txt", "third.txt"]
    for found, text in zip(entry.perplexity, world.measured.texts, strict=True):
        assert found.perplexity == pytest.approx(text.pruned, rel=1e-4)
        assert found.interval == pytest.approx([1, 1], rel=1e-4)


def test_tasks_compare_the_same_documents(world: SimpleNamespace, tokenizer: Any, task_documents: Path) -> None:
    from transformers import AutoModelForCausalLM

    from gradmap_hub.evaluation import tasks as harness

    assert [task.name for task in world.measured.tasks] == list(TASKS)
    for which, folder in (("original", world.original), ("pruned", world.folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = harness.run_tasks(model, tokenizer, TASKS, documents=task_documents, limit=4)
        for task in world.measured.tasks:
            assert (task.documents, task.total, task.sha256) == (4, 6, found[task.name].sha256)
            for metric in task.metrics:
                assert getattr(metric, which) == found[task.name].metric(metric.name).value
    arc, boolq, wikitext = world.measured.tasks
    assert [metric.name for metric in arc.metrics] == ["acc", "acc_norm"] and arc.main == "acc_norm"
    assert arc.source == "arc_easy.test.jsonl" and boolq.dataset == "aps/super_glue"
    for metric in (*arc.metrics, *boolq.metrics):
        assert metric.interval[0] <= metric.pruned - metric.original <= metric.interval[1]
        assert metric.retention == (100 * metric.pruned / metric.original if metric.original else None)
    assert not any(metric.interval or metric.retention for metric in wikitext.metrics)


def test_speed_of_every_backend(world: SimpleNamespace) -> None:
    labels = [(entry.model, entry.backend, entry.batch) for entry in world.measured.speed]
    assert labels == [
        ("original", PYTORCH, 1), ("original", PYTORCH, 8), ("pruned", PYTORCH, 1), ("pruned", PYTORCH, 8),
        ("pruned", "onnx/model.onnx", 1),
    ]  # fmt: skip
    for entry in world.measured.speed:
        for rate in (entry.prefill, entry.decode):
            assert 0 < rate.low <= rate.median <= rate.high
    peaks = [entry.memory for entry in world.measured.speed]
    if Path("/proc/self/status").exists():
        *eager, graph = peaks
        assert graph > 20e6 and min(eager) > 2 * graph  # with torch in them


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells")
def test_memory_is_not_that_of_the_process_that_asks(world: SimpleNamespace) -> None:
    held = np.ones(100_000_000)  # 800 MB; the peak that getrusage tells a child begins here
    peak = peak_memory(world.folder, "onnx/model.onnx", 1, prompt_tokens=8, new_tokens=2)
    assert peak is not None and peak < 400e6 < held.nbytes


def fake_python(path: Path, script: str) -> str:
    """An interpreter that runs `script` instead, but for the process in which a tokenizer is tried."""
    real = f'case "$*" in *tokenizer_worker*) exec "{sys.executable}" "$@";; esac'
    path.write_text(f"#!/bin/sh\n{real}\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo loading >&2; kill -9 $$", "killed by SIGKILL"), ("echo one >&2; echo two >&2; exit 3", ": two"),
     ("exit 3", "exited with status 3")],
)  # fmt: skip
def test_a_memory_process_that_dies_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", script))
    with pytest.raises(MemoryNotMeasured) as caught:
        peak_memory(tmp_path, PYTORCH, 1)
    assert caught.value.message.startswith("Memory of PyTorch was not measured: ")
    assert caught.value.message.endswith(reason)


def test_the_evaluation_goes_on_without_the_memory_of_a_killed_backend(
    world: SimpleNamespace, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend of the ONNX file is killed; a later evaluation tries it again."""
    script = 'case "$*" in *onnx/model.onnx*) kill -9 $$;; *) echo 4096;; esac'
    monkeypatch.setattr(sys, "executable", fake_python(copy.with_name("python"), script))
    (copy.with_name("small.work") / "evaluate-memory.json").unlink()
    heard = Heard()
    measured = evaluate_folder(copy, world.config, reporter=heard).measured
    assert measured is not None and [entry.memory for entry in measured.speed] == [4096] * 4 + [None]
    assert [entry.prefill for entry in measured.speed] == [entry.prefill for entry in world.measured.speed]
    (note,) = [note for note in heard.notes if "Memory" in note]
    assert note == ("Pruned, batch 1: Memory of onnx/model.onnx was not measured: its process was killed by SIGKILL")
    assert "4.1 kB |" in (copy / "README.md").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", fake_python(copy.with_name("python"), "echo 8192"))
    again = evaluate_folder(copy, world.config).measured
    assert again is not None and {entry.memory for entry in again.speed} == {8192}


def test_what_it_was_measured_on_is_on_record(world: SimpleNamespace) -> None:
    measured = world.measured
    assert RunRecord.read(world.folder) == world.record
    assert measured.weights_sha256 == folder_sha256(world.folder)
    assert measured.original_sha256 == folder_sha256(world.original) and measured.original_commit is None
    assert measured.bytes.before > measured.bytes.after == (world.folder / "model.safetensors").stat().st_size
    assert measured.harness and measured.versions["torch"] and measured.hardware and measured.precision == "float32"
    assert measured.settings["limit"] == 4 and measured.settings["seq_len"] == TOKENS
    assert [text.contamination and text.contamination.rows for text in measured.texts] == [0, 0]
    assert len(measured.samples) == 8 and all(sample.original for sample in measured.samples)
    assert str(world.root) not in to_json(world.record)
    assert not list(world.folder.with_name("small.work").glob("evaluate-*.safetensors"))


def test_a_second_run_computes_nothing_and_says_the_same(world: SimpleNamespace) -> None:
    before = (world.folder / FILE_NAME).read_bytes()
    heard = Heard()
    assert evaluate_folder(world.folder, world.config, reporter=heard) == world.record
    assert (world.folder / FILE_NAME).read_bytes() == before
    assert len(heard.reused) == 2 * 2 + 2 * 3 + 2 + 2 + 2 and not set(heard.reused) & set(heard.computed)


@pytest.mark.slow
def test_computed_anew_it_gives_the_same_numbers(world: SimpleNamespace, copy: Path) -> None:
    shutil.rmtree(copy.with_name("small.work"))
    config = dataclasses.replace(world.config, speed=False)
    again = evaluate_folder(copy, config).measured
    settings = world.measured.settings | {"speed": None}
    assert again == dataclasses.replace(world.measured, speed=[], settings=settings)


def test_interrupted_it_leaves_the_record_and_goes_on(world: SimpleNamespace, copy: Path) -> None:
    """A task more is asked for; what is known of the rest is not measured again."""
    before = {name: (copy / name).read_bytes() for name in (FILE_NAME, "README.md")}
    config = dataclasses.replace(world.config, tasks=(*TASKS, "piqa"), speed=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(copy, config, reporter=Heard(stop_at="Pruned on piqa"))
    assert before == {name: (copy / name).read_bytes() for name in before}
    heard = Heard()
    record = evaluate_folder(copy, config, reporter=heard)
    assert "Original on piqa" in heard.reused and "Pruned on piqa" in heard.computed
    assert not [title for title in heard.computed if " on " in title and "piqa" not in title]
    assert record.measured is not None and record.measured.tasks[:3] == world.measured.tasks


def in_top5(original: torch.Tensor, pruned: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the original's top-1 token is among the five of the pruned model."""
    del targets
    return (pruned.topk(5).indices == original.argmax(-1, keepdim=True)).any(-1)


@pytest.mark.slow
def test_a_metric_from_outside(
    world: SimpleNamespace, copy: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """A row of `METRICS` is enough: record, JSON answer, card and terminal have it."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(texts, "METRICS", [*texts.METRICS, texts.Metric("in_top5", in_top5, "In top 5", share=True)])
    config = dataclasses.replace(world.config, text=world.config.text[:1], tasks=(), tasks_from=None, limit=None,
                                 speed=False)  # fmt: skip
    heard = Heard()
    record = evaluate_folder(copy, config, reporter=heard)
    assert "Original on other.txt" in heard.reused and "Pruned on other.txt" in heard.computed
    assert record.measured is not None and RunRecord.read(copy) == record
    (text,), (before, _) = record.measured.texts, world.measured.texts
    (metric,) = text.further
    assert dataclasses.replace(text, further=[]) == before

    rows = rows_of(world.root / "other.txt", tokenizer, ROWS)
    with torch.no_grad():
        original, pruned = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(rows).logits[:, :-1]
            for folder in (world.original, world.folder)
        )
    expected = float(in_top5(original, pruned, rows[:, 1:]).double().mean())
    assert (metric.name, metric.value) == ("in_top5", pytest.approx(expected, abs=0.01))
    assert metric.interval[0] <= metric.value <= metric.interval[1] and metric.value > text.agreement

    (recorded,) = json.loads((copy / FILE_NAME).read_text())["measured"]["texts"]
    assert recorded["further"][0]["title"] == "In top 5"
    assert command.evaluation_json(record, copy)["texts"] == [recorded]
    assert "| In top 5 |" in (copy / "README.md").read_text()
    console = Console(width=200)
    with console.capture() as shown:
        console.print(*command._view(record))
    assert "In top 5" in shown.get() and "Top-1 agreement" in shown.get()
    # Without such a row there is no key.
    (plain, _) = json.loads((world.folder / FILE_NAME).read_text())["measured"]["texts"]
    assert plain.keys() == recorded.keys() - {"further"}


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_other_weights_other_hash_and_nothing_stale_is_shown(world: SimpleNamespace, copy: Path) -> None:
    page = (copy / "README.md").read_text()
    assert "## Evaluation" in page and "arc_easy" in page
    change_a_byte(copy / "model.safetensors")
    stale = without_stale(RunRecord.read(copy), copy)
    assert stale.measured is None and "other weights" in stale.measured_note
    write_card(stale, copy)
    page = (copy / "README.md").read_text()
    assert "## Evaluation" not in page and "arc_easy" not in page
    assert "An evaluation of other weights is not shown" in page
    heard = Heard()
    measured = evaluate_folder(copy, dataclasses.replace(world.config, tasks=(), tasks_from=None, limit=None,
                                                         speed=False), reporter=heard).measured  # fmt: skip
    assert measured is not None and measured.weights_sha256 == folder_sha256(copy) != world.measured.weights_sha256
    assert "Original on other.txt" in heard.reused and "Pruned on other.txt" in heard.computed
    assert "An evaluation of other weights" not in (copy / "README.md").read_text()


def test_another_onnx_file_loses_its_numbers_alone(world: SimpleNamespace, copy: Path) -> None:
    change_a_byte(copy / "onnx" / "model.onnx")
    kept = without_stale(world.record, copy)
    assert kept.measured is not None and kept.measured.texts == world.measured.texts
    assert not kept.measured.files and {entry.backend for entry in kept.measured.speed} == {PYTORCH}
    assert "onnx/model.onnx was of another file" in kept.measured_note
    assert "was of another file and is not shown" in card_text(kept)
    (copy / "onnx" / "model.onnx").unlink()
    assert without_stale(world.record, copy) == kept


def test_a_record_made_anew_keeps_what_still_holds(world: SimpleNamespace, copy: Path) -> None:
    """As after `push --resume`: the run writes its record without an evaluation."""
    bare = dataclasses.replace(world.record, measured=None)
    assert without_stale(with_earlier(bare, copy), copy) == world.record
    assert with_earlier(bare, copy.with_name("nowhere")) == bare


def test_the_app_shows_what_the_card_does(world: SimpleNamespace, tmp_path: Path) -> None:
    facts = tmp_path / "compare.json"
    models = {"original": {"name": "a"}, "pruned": {"name": "b"}}
    facts.write_text(json.dumps({"title": "x", "perplexity": [], **models}))
    refresh_compare(world.record, tmp_path)
    shown = json.loads(facts.read_text())
    assert shown["title"] == "x" and [row["text"] for row in shown["perplexity"]] == ["other.txt", "third.txt"]
    assert shown["perplexity"][0]["pruned"] == world.measured.texts[0].pruned
    stale = dataclasses.replace(world.record, measured=None)
    refresh_compare(stale, tmp_path)
    assert [row["text"] for row in json.loads(facts.read_text())["perplexity"]] == ["calibration.txt"]
    refresh_compare(stale, tmp_path / "nowhere")


def test_card_and_metadata(world: SimpleNamespace) -> None:
    licensed = dataclasses.replace(world.record, base=dataclasses.replace(world.record.base, license="mit"))
    text = card_text(licensed)
    # Three tasks and two texts of the evaluation, one text of the run.
    assert check_card(text, "model").results == 3 + 2 + 1
    header = yaml.safe_load(text.split("---\n")[1])
    results = header["model-index"][0]["results"]
    arc = next(entry for entry in results if entry["dataset"]["name"] == "arc_easy")
    assert arc["dataset"] == {"name": "arc_easy", "type": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"}
    assert [metric["name"] for metric in arc["metrics"]] == [
        "acc, zero-shot, first 4 documents of arc_easy.test.jsonl",
        "acc_norm, zero-shot, first 4 documents of arc_easy.test.jsonl",
    ]
    assert arc["metrics"][1]["value"] == round(world.measured.tasks[0].main_metric.pruned, 4)
    for words in (
        "4 of 6",
        "acc_norm",
        "Safety and bias were not evaluated",
        "`wikitext` are from local files",
        "No sequence of other.txt has a 13-gram overlap",
    ):
        assert words in text, words
    assert "| mean of 2 |" in text and "`onnx/model.onnx`" in text


def whole(measured: Measured) -> Measured:
    """As if all documents had been fetched by the harness."""
    tasks = [dataclasses.replace(task, documents=task.total, source=task.dataset) for task in measured.tasks]
    return dataclasses.replace(measured, tasks=tasks)


def test_results_for_the_hub_only_of_whole_tasks(world: SimpleNamespace, tmp_path: Path) -> None:
    assert not (world.folder / ".eval_results").exists()
    record = dataclasses.replace(world.record, target="acme/small", measured=whole(world.measured))
    written = write_card(record, tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in written if path.suffix == ".yaml"]
    assert names == [".eval_results/arc_easy.yaml", ".eval_results/boolq.yaml"]  # wikitext is no benchmark of right
    (entry,) = yaml.safe_load((tmp_path / names[0]).read_text())
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "ARC-Easy"}
    assert entry["value"] == round(100 * world.measured.tasks[0].main_metric.pruned, 2)
    assert entry["source"]["url"] == "https://huggingface.co/acme/small" and "zero-shot" in entry["notes"]
    screen(tmp_path, "model", Private())
    assert all(is_ours(name, "model") for name in names)
    assert not publishable(names[0], "space") and not publishable(".eval_results/run.py", "model")
    assert not publishable(".eval_results/a/b.yaml", "model") and not publishable(".eval_results/.a.yaml", "model")
    write_card(world.record, tmp_path)
    assert not (tmp_path / ".eval_results").exists()


@pytest.mark.slow
def test_calibration_rows_in_a_text_are_named(world: SimpleNamespace, copy: Path) -> None:
    """The calibration text itself, but for its sum: some of its rows were drawn."""
    text = copy.with_name("copied.txt")
    text.write_text((world.root / "calibration.txt").read_text() + "\n")
    shutil.copy(world.root / "calibration.txt", copy.with_name("calibration.txt"))
    config = EvaluateConfig(against=str(world.original), text=(str(text),), seq_len=TOKENS, rows=100, speed=False)
    record = evaluate_folder(copy, config)
    assert record.measured is not None
    found = record.measured.texts[0].contamination
    assert found is not None and found.rows is not None and 0 < found.rows < found.of and found.share
    assert found.texts[0] == "calibration.txt"
    page = (copy / "README.md").read_text()
    assert (
        f"{found.rows} of {found.of} sequences" in page and "have a 13-gram overlap with the calibration text" in page
    )
    copy.with_name("calibration.txt").write_text("another text")
    heard = Heard()
    again = evaluate_folder(copy, config, reporter=heard).measured
    assert again is not None and again.texts[0].contamination is not None
    assert again.texts[0].contamination.rows is None and "not available" in again.texts[0].contamination.reason
    assert "was not checked" in (copy / "README.md").read_text() and any(
        "sha256 differs" in note for note in heard.notes
    )


def test_what_cannot_be_measured_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    config, other = world.config, str(world.root / "other.txt")
    plain = EvaluateConfig(against=str(world.original), text=(other,), speed=False)
    cases: list[tuple[type[Exception], str, Callable[[], EvaluateConfig]]] = [
        (UsageError, "--rows must be at least 2", lambda: EvaluateConfig(rows=1)),
        (UsageError, "--limit is for tasks", lambda: EvaluateConfig(limit=5)),
        (UsageError, "--tasks-from needs --tasks", lambda: EvaluateConfig(tasks_from=tmp_path)),
        (UsageError, "Unknown task 'mmlu'", lambda: dataclasses.replace(config, tasks=("mmlu",))),
        (CalibrationError, "does not contain piqa.validation.jsonl",
         lambda: dataclasses.replace(config, tasks=("piqa",), tasks_from=tmp_path)),
        (CalibrationError, "No such text file", lambda: dataclasses.replace(plain, text=("gone.txt",))),
        (CalibrationError, "is given twice", lambda: dataclasses.replace(plain, text=(other, other))),
        (CalibrationError, "too short", lambda: dataclasses.replace(plain, text=(str(world.root / "short.txt"),))),
        (UsageError, "reads at most 512 tokens", lambda: dataclasses.replace(plain, seq_len=1024)),
        (SourceError, "made from a local model, original", lambda: dataclasses.replace(plain, against=None)),
        (SourceError, "has 3 layers", lambda: dataclasses.replace(plain, against=str(world.folder))),
    ]  # fmt: skip
    (world.root / "short.txt").write_text("A few words.")
    for kind, said, make in cases:
        with pytest.raises(kind, match=said):
            evaluate_folder(world.folder, make())
    with pytest.raises(SourceError, match="is not a finished folder of gradmap-hub"):
        evaluate_folder(world.original, plain)


@pytest.mark.slow
def test_another_model_than_the_original_of_the_record_is_told(
    world: SimpleNamespace, copy: Path, folder_of: Any
) -> None:
    another = folder_of(copy.with_name("another"), seed=5)
    heard = Heard()
    text = (str(world.root / "other.txt"),)
    evaluate_folder(copy, EvaluateConfig(against=str(another), text=text, rows=2, speed=False), reporter=heard)
    assert any("another is not the original of the record" in note for note in heard.notes)


@pytest.mark.slow
def test_command_prints_one_object(world: SimpleNamespace, copy: Path) -> None:
    config = world.config
    done = subprocess.run(
        [
            sys.executable, "-m", "gradmap_hub", "evaluate", str(copy), "--against", str(world.original),
            "--text", str(config.text[0]), "--text", str(config.text[1]), "--tasks", ",".join(TASKS), "--tasks-from",
            str(config.tasks_from), "--limit", "4", "--seq-len", str(TOKENS), "--rows", str(ROWS), "--no-speed",
            "--json",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    measured = world.measured
    assert answer["perplexity"]["original"] == measured.texts[0].original
    assert answer["perplexity"]["pruned"] == measured.texts[0].pruned
    assert set(answer["data"]) == {"source", "tokens", "sequence_length", "sha256"}
    assert answer["data"]["sha256"] == measured.texts[0].sha256
    arc = answer["tasks"]["arc_easy"]
    assert set(arc["original"]) == set(arc["pruned"]) == {"acc", "acc_norm"}
    assert arc["interval"] == measured.tasks[0].main_metric.interval and len(arc["interval"]) == 2
    assert set(answer["tasks"]["boolq"]["original"]) == {"acc"}
    assert answer["weights_sha256"] == measured.weights_sha256 and answer["speed"] == []


def test_sums_are_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = folder_sha256(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"2")
    assert folder_sha256(tmp_path) != one
    graph = tmp_path / "model.onnx"
    assert freshness.data_file(graph) is None
    (tmp_path / "model.onnx_data").write_bytes(b"3")
    assert freshness.data_file(graph) == tmp_path / "model.onnx_data"
