"""`evaluate`: measure a finished folder and its original on the same texts, tasks and machine.

`evaluation.suite.MEASUREMENTS` lists what is measured. Every step of it is a stage with its own inputs (weights,
sequences, documents), so that a later command with other measurements reuses its result. The weights and ONNX files
of the folder do not change.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmap_hub import __version__
from gradmap_hub.data.rows import Rows, embedding_rows, tokenize
from gradmap_hub.data.texts import check_text_files, text_of
from gradmap_hub.errors import CalibrationError, SourceError, UsageError
from gradmap_hub.evaluation import costs, tasks
from gradmap_hub.evaluation.measurement import ORIGINAL, PRUNED, Context, Models, Step
from gradmap_hub.evaluation.onnx_files import find_graphs
from gradmap_hub.evaluation.samples import PROMPTS
from gradmap_hub.evaluation.staleness import folder_sha256
from gradmap_hub.evaluation.suite import MEASUREMENTS
from gradmap_hub.evaluation.texts import delete_states
from gradmap_hub.folder_config import EvaluateConfig
from gradmap_hub.layout import work_folder
from gradmap_hub.machine import hardware, versions
from gradmap_hub.measurements import BeforeAfter, Measured
from gradmap_hub.models.checkpoint import checkpoint_bytes
from gradmap_hub.models.decoder import choose_precision
from gradmap_hub.models.original import OriginalModel
from gradmap_hub.models.safetensors_files import read_config
from gradmap_hub.models.source import Source
from gradmap_hub.models.tokenizer import load_tokenizer
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.recorded import compare_with_calibration, find_original
from gradmap_hub.pipeline.results import read_folder, write_results
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord
from gradmap_hub.stage_cache import Stages
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub


def evaluate_folder(
    folder: Path, config: EvaluateConfig | None = None, *, reporter: Reporter | None = None, hub: Hub | None = None
) -> RunRecord:
    """Measure a pruned folder and its original on the same text, tasks and machine. Record and card are rewritten once
    all results are known.

    Args:
        folder: A folder made by prune or push.
        config: What to measure, on which texts and tasks.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub, reporter = connect(hub, reporter)
    folder = folder if folder.name else folder.resolve()  # "." has no folder beside it
    record = evaluate_stages(folder, config or EvaluateConfig(), reporter=reporter, hub=hub)
    return write_results(record, folder, reporter)


def evaluate_stages(folder: Path, config: EvaluateConfig, *, reporter: Reporter, hub: Hub) -> RunRecord:
    """Measure, and return the record of `folder` with the results; it is not written.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    record = read_folder(folder)
    check_text_files(config.text)
    names = _check_tasks(config)
    _check_length(folder, config)
    source = find_original(folder, record, config.against, hub)
    work = work_folder(folder)
    work.mkdir(parents=True, exist_ok=True)
    original = OriginalModel(source, hub, work, reporter.note)
    texts = _read_texts(folder, original, config, reporter, hub)
    contamination = compare_with_calibration(folder, record, original, texts, config.text, reporter, hub)
    context = Context(
        folder=folder,
        graphs=find_graphs(folder, reporter),
        models=_open_models(folder, record, original, config, reporter),
        tokenizer=original.tokenizer(),
        texts=texts,
        tasks=names,
        prompts=PROMPTS,
        config=config,
        reporter=reporter,
        work=work,
    )
    sections = measure(context)
    delete_states(work)
    sections["texts"] = [
        dataclasses.replace(text, contamination=shared)
        for text, shared in zip(sections["texts"], contamination, strict=True)
    ]
    return dataclasses.replace(record, measured=_measured(context, source, sections), measured_note="")


def measure(context: Context) -> dict[str, list[Any]]:
    """The results of all measurements, by name of the measurement."""
    steps = [step for measurement in MEASUREMENTS for step in measurement.steps(context)]
    found: dict[str, Any] = {}
    for loads in (ORIGINAL, PRUNED, None):  # all steps of one model, then those of the other: one at a time in memory
        if loads is None:
            context.models.close()
        for step in steps:
            if step.loads == loads:
                found[step.name] = _stage(context, step)
    return {measurement.name: measurement.result(context, found) for measurement in MEASUREMENTS}


def _stage(context: Context, step: Step[Any]) -> Any:
    """The stored result of a step, or the computed one."""
    models = context.models
    identity = {
        "version": __version__,
        "what": "evaluate",
        "precision": [str(models.dtype), models.device],
        **{which: models.sha256[which] for which in step.weights},
    }
    stages = Stages(context.work, context.reporter, identity)
    name = f"evaluate-{step.name}"
    result = stages.run(name, step.title, step.kind, step.compute, inputs=step.inputs, describe=step.describe)
    if not step.final(result):
        (context.work / f"{name}.json").unlink()
    return result


def _measured(context: Context, source: Source, sections: dict[str, list[Any]]) -> Measured:
    config, models, base = context.config, context.models, source.base
    return Measured(
        gradmap_hub=__version__,
        weights_sha256=models.sha256[PRUNED],
        original=base.name,
        original_commit=base.commit,
        original_sha256=models.sha256[ORIGINAL],
        bytes=BeforeAfter(*(checkpoint_bytes(models.folders[which]) for which in (ORIGINAL, PRUNED))),
        precision=str(models.dtype).removeprefix("torch."),
        **sections,
        harness=tasks.harness_version() if context.tasks else None,
        settings={
            "text": [rows.name for rows in context.texts],
            "seq_len": config.seq_len,
            "rows": config.rows,
            "tasks": list(context.tasks),
            "limit": config.limit,
            "threads": torch.get_num_threads(),
            "speed": costs.settings(context) if config.speed else None,
        },
        versions=versions(),
        hardware=hardware() if models.device == "cpu" else f"{hardware()}, {models.device}",
    )


# -- before anything is measured, cheapest first ---------------------------------------------------------------------


def _check_tasks(config: EvaluateConfig) -> tuple[str, ...]:
    if not config.tasks:
        return ()
    names = tasks.chosen(config.tasks)
    tasks.check(names, config.tasks_from)
    return names


def _check_length(folder: Path, config: EvaluateConfig) -> None:
    longest = read_config(folder / "config.json").get("max_position_embeddings")
    if isinstance(longest, int) and config.seq_len > longest:
        raise UsageError(f"--seq-len is {config.seq_len}; this model reads at most {longest} tokens.")


def _read_texts(
    folder: Path, original: OriginalModel, config: EvaluateConfig, reporter: Reporter, hub: Hub
) -> list[Rows]:
    """The sequences of every text: all of them, or `config.rows` spread evenly.

    Raises:
        CalibrationError: a text is too short, or is given twice.
        SourceError: the two models have different tokenizers.
    """
    reporter.start("Reading text")
    texts = [text_of(source, hub) for source in config.text]
    tokenizer = original.tokenizer(text.content for text in texts)
    if load_tokenizer(folder, str(folder)).get_vocab() != tokenizer.get_vocab():
        raise SourceError(
            f"{original.source.base.name} is not the original of {folder}: their vocabularies differ.",
            hint=f"Give the original of {folder} with --against.",
        )
    found: list[Rows] = []
    for text in texts:
        rows = tokenize(text, tokenizer, config.seq_len, embedding_rows(original.source.config))
        if len(rows.ids) < 2:
            raise CalibrationError(
                f"The text {rows.name} is too short: it needs at least two sequences of {config.seq_len} tokens.",
                hint="Give a longer text, or shorter sequences with --seq-len.",
            )
        if rows.sha256 in (other.sha256 for other in found):
            raise CalibrationError(f"The text {rows.name} is given twice.", hint="Give each text once.")
        step = max(1, len(rows.ids) // config.rows)
        found.append(Rows(rows.name, rows.sha256, rows.ids[::step][: config.rows]))
    reporter.finish(", ".join(f"{rows.ids.numel():,} tokens of {rows.name}" for rows in found))
    return found


def _open_models(
    folder: Path, record: RunRecord, original: OriginalModel, config: EvaluateConfig, reporter: Reporter
) -> Models:
    base = original.source.base
    reporter.start(f"Fetching {base.name}")
    folders = {ORIGINAL: original.checkpoint(), PRUNED: folder}
    reporter.finish(size(checkpoint_bytes(folders[ORIGINAL])))
    reporter.start("Computing checksums of the weights")
    sums = {which: folder_sha256(place) for which, place in folders.items()}
    reporter.finish(f"pruned {sums[PRUNED][:12]}")
    moved = record.base.commit is not None and base.commit not in (None, record.base.commit)
    recorded = record.base.weights_sha256
    if moved or (recorded is not None and base.commit is None and sums[ORIGINAL] != recorded):
        reporter.note(f"{base.name} is not the original of the record: its weights differ.")
    stored = "bfloat16" if {base.dtype, record.dtype} == {"bfloat16"} else "float32"
    dtype, device = choose_precision("auto", "auto", stored, streamed=False)
    return Models(folders, sums, original.source.architecture, config.seq_len, dtype, device)
