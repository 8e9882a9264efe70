"""Exports of a pruned folder and of its original: resumable stages, checked against the checkpoint and recorded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import DEFAULT_CALIBRATION
from gradmap_hub.data.texts import text_of
from gradmap_hub.errors import OutputExists, VerificationError
from gradmap_hub.formats import FORMATS, ONNX, ONNX_FOLDER, graph_names
from gradmap_hub.layout import artifact, work_folder
from gradmap_hub.models.safetensors_files import read_config
from gradmap_hub.models.tokenizer import load_tokenizer
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.results import read_folder, write_results
from gradmap_hub.progress import Reporter
from gradmap_hub.record import Artifact, Parity, Quality, RunRecord
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.exporters.export import Exported
    from gradmap_hub.hub.client import Hub

# The held-out text on which the export of a finished folder is measured: sequences, and tokens of each.
EXPORT_ROWS, EXPORT_TOKENS = 8, 512


def export_checked(
    folder: Path,
    record: RunRecord,
    stages: Stages,
    names: Sequence[str],
    rows: Rows,
    *,
    fit: Tensor | None = None,
    keep_failing: bool = False,
) -> RunRecord:
    """Export `folder` to the formats `names` and check the files; returns the record with the new artifacts.

    A file that fails its check is deleted. The run continues if the format allows it (`Format.may_fail`).

    Args:
        folder: The model folder.
        record: Its record.
        stages: The stages of the run, which cache the exports.
        names: Formats other than Optimum's graph.
        rows: Held-out sequences on which perplexity is measured.
        fit: Other sequences on which the rounding is fitted: token ids, (sequences, tokens).
        keep_failing: Keep a file that fails its check.

    Raises:
        VerificationError: an exporter failed, or a format that may not fail differs from PyTorch.
    """
    from gradmap_hub.exporters import environment, export

    environment.prepare(stages.reporter)
    destination, work = folder / ONNX_FOLDER, work_folder(folder) / "export"
    artifacts = [entry for entry in record.artifacts if entry.format not in names]
    try:
        for name in names:
            exported = _stage(stages, folder, destination, work, name, rows, fit, keep_failing=keep_failing)
            if exported.note:
                stages.reporter.note(exported.note)
            if not FORMATS[name].may_fail and not exported.check.passed:
                raise VerificationError(
                    f"The {name} export differs from PyTorch: {exported.check.reason}.",
                    hint="Leave this format out of --to or --quantize.",
                )
            artifacts += _artifacts(exported, folder, rows)
    finally:
        export.clear(work)
    return dataclasses.replace(record, artifacts=artifacts, timings=record.timings | stages.timings)


def onnx_stage(stages: Stages, name: str, title: str, checkpoint: Path, destination: Path) -> Parity:
    """Export Optimum's float32 graph of a checkpoint and compare it with PyTorch, as a resumable stage.

    Args:
        stages: The stages of the run.
        name: The name of the stage.
        title: Its title for the reporter.
        checkpoint: The folder of the checkpoint.
        destination: The folder for the graph.

    Raises:
        VerificationError: the export failed, or it differs from PyTorch.
    """
    from gradmap_hub.exporters import environment, onnx

    environment.prepare(stages.reporter)

    def compute() -> Parity:
        destination.parent.mkdir(parents=True, exist_ok=True)
        onnx.export_onnx(checkpoint, destination)
        return onnx.check_parity(checkpoint, destination)

    return stages.run(
        name,
        title,
        Parity,
        compute,
        inputs={"checkpoint": sorted((path.name, path.stat().st_size) for path in checkpoint.glob("*.safetensors"))},
        files=lambda: [destination / onnx.MODEL],
        describe=lambda parity: f"logits differ by at most {parity.max_logit_difference:.1e}, greedy tokens equal",
    )


def export_original(
    checkpoint: Path,
    destination: Path,
    stages: Stages,
    names: Sequence[str],
    rows: Rows,
    work: Path,
    *,
    fit: Tensor | None = None,
) -> dict[str, Quality]:
    """Export the original to the formats `names`, for the comparison Space.

    Args:
        checkpoint: The folder of the original.
        destination: The folder for the files.
        stages: The stages of the run, which cache the exports.
        names: Formats other than Optimum's graph.
        rows, fit: See `export_checked`.
        work: A cache folder that the formats share; removed at the end.

    Returns:
        The cost of each format that passed its check, by format; the others leave no file.

    Raises:
        VerificationError: an exporter failed.
    """
    from gradmap_hub.exporters import environment, export

    environment.prepare(stages.reporter)
    found: dict[str, Quality] = {}
    try:
        for name in names:
            exported = _stage(stages, checkpoint, destination, work, name, rows, fit, of="original")
            if exported.note:
                stages.reporter.note(f"The original: {exported.note}")
            if exported.files:
                found[name] = _quality(exported, rows.name, rows.ids.numel())
    finally:
        export.clear(work)
    return found


def _stage(
    stages: Stages,
    folder: Path,
    destination: Path,
    work: Path,
    name: str,
    rows: Rows,
    fit: Tensor | None,
    *,
    keep_failing: bool = False,
    of: str = "",
) -> Exported:
    from gradmap_hub.data.rows import sha256_of_ids
    from gradmap_hub.exporters import export
    from gradmap_hub.exporters.recipes import LADDERS

    title = FORMATS[name].title
    destination.mkdir(parents=True, exist_ok=True)
    optimum = destination / FORMATS[ONNX].file
    return stages.run(
        f"export-{name}-{of}" if of else f"export-{name}",
        f"The {of}: {title[0].lower()}{title[1:]}" if of else title,
        export.Exported,
        lambda: export.export(
            name,
            folder,
            destination,
            rows=rows.ids.numpy(),
            work=work,
            fit=None if fit is None else fit.numpy(),
            optimum=optimum if optimum.is_file() else None,
            keep_failing=keep_failing,
            for_genai=not of,  # the original's graphs are for the Space
            reporter=stages.reporter,
        ),
        inputs={
            "checkpoint": sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors")),
            "rows": rows.sha256,
            "fit": None if fit is None else sha256_of_ids(fit),
            "keep_failing": keep_failing,
            "recipes": [dataclasses.asdict(recipe) for recipe in LADDERS.get(name, ())],
        },
        files=lambda: [path for path in _files(destination, name) if path.is_file()],
        describe=_describe,
    )


def _files(destination: Path, name: str) -> list[Path]:
    graphs = [destination / file for file in graph_names(FORMATS[name])]
    return [file for graph in graphs for file in (graph, graph.with_name(graph.name + "_data"))]


def remove_exports(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of formats that this run does not export: they may be of an earlier run with other layers."""
    from gradmap_hub.exporters import export, genai

    for name in names:
        for path in _files(folder / ONNX_FOLDER, name):
            path.unlink(missing_ok=True)
    config = folder / ONNX_FOLDER / genai.CONFIG
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
        if not (config.parent / named).is_file():
            for path in (config, *(config.parent / file for file in export.GENAI_TOKENIZER)):
                path.unlink(missing_ok=True)


def _describe(exported: Exported) -> str:
    if not exported.files:
        return "failed its check, not kept"
    if FORMATS[exported.format].limits is None:
        return f"{exported.bytes / 1e6:.1f} MB, not checked"
    check = exported.check
    return f"{exported.bytes / 1e6:.1f} MB, perplexity {100 * (check.ratio - 1):+.1f} % against the checkpoint"


def _artifacts(exported: Exported, folder: Path, rows: Rows) -> list[Artifact]:
    found = []
    row = FORMATS[exported.format]
    for name in exported.files:
        entry = artifact(folder / ONNX_FOLDER / name, folder, row.name, None)
        if name in (row.file, row.alias) and row.limits is not None:
            entry = dataclasses.replace(
                entry, parity=exported.check.parity(), quality=_quality(exported, rows.name, rows.ids.numel())
            )
        found.append(entry)
    return found


def _quality(exported: Exported, text: str, tokens: int) -> Quality:
    check = exported.check
    settings: dict[str, Any] = exported.settings
    recipe = str(settings.get("name") or settings.get("precision") or exported.format)
    return Quality(check.perplexity, check.reference_perplexity, text, tokens, recipe, exported.base)


def export_folder(
    folder: Path,
    formats: Sequence[str],
    *,
    text: str = DEFAULT_CALIBRATION,
    keep_failing: bool = False,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> RunRecord:
    """Export a pruned folder to `formats` and update its record and card.

    Args:
        folder: A folder made by prune or push.
        formats: Names in `formats.FORMATS`.
        text: Text on which the perplexity of formats other than `onnx` is measured: a file or a dataset of the Hub,
            preferably not the calibration text.
        keep_failing: Keep quantised files that fail their check.

    Raises:
        GradmapError: a format is unknown or does not support the model; a package or the text is missing; a check
            failed.
    """
    from gradmap_hub.exporters.export import require

    record = read_folder(folder)
    config = read_config(folder / "config.json")
    for name in formats:
        require(name, config)
    hub, reporter = connect(hub, reporter)
    checked = [name for name in formats if name != ONNX]
    rows = held_out_rows(folder, text, hub) if checked else None
    if not folder.is_dir():
        raise OutputExists(f"{folder} is not a folder.")
    stages = Stages(work_folder(folder), reporter, {"version": __version__, "what": "export"})
    if ONNX in formats:
        record = export_optimum(folder, record, stages)
    if rows is not None:
        record = export_checked(folder, record, stages, checked, rows, keep_failing=keep_failing)
    return write_results(record, folder, reporter)


def held_out_rows(folder: Path, source: str, hub: Hub) -> Rows:
    """The sequences of a text on which exports of a finished folder are measured. `source`: a file or a dataset."""
    from gradmap_hub.data.rows import embedding_rows, evaluation_rows

    text, config = text_of(source, hub), read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder, str(folder), [text.content])
    longest = config.get("max_position_embeddings")
    tokens = min(EXPORT_TOKENS, longest) if isinstance(longest, int) else EXPORT_TOKENS
    return evaluation_rows(text, tokenizer, seq_len=tokens, rows=EXPORT_ROWS, vocabulary=embedding_rows(config))


def remove_onnx(folder: Path) -> None:
    """Remove all exports of a model folder."""
    for name in (ONNX_FOLDER, f"{ONNX_FOLDER}.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def export_optimum(folder: Path, record: RunRecord, stages: Stages) -> RunRecord:
    """Export `folder` with Optimum and compare it with PyTorch; returns the record with the new artifacts.

    Raises:
        VerificationError: the export failed, or it differs from PyTorch.
    """
    from gradmap_hub.exporters import onnx

    destination = folder / ONNX_FOLDER
    parity = onnx_stage(stages, "onnx", FORMATS[ONNX].title, folder, destination)
    artifacts = [entry for entry in record.artifacts if entry.format != ONNX]
    for path in onnx.file_names(destination):
        if path.suffix != ".json":
            artifacts.append(artifact(path, folder, ONNX, parity if path.name == onnx.MODEL else None))
    timings = record.timings | stages.timings
    return dataclasses.replace(record, artifacts=artifacts, timings=timings)
