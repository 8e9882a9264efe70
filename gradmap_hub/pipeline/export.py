"""`export`: ONNX files of a folder, compared with its checkpoint; resumable. The record lists those that pass."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
)
from gradmap_hub.data.texts import text_of
from gradmap_hub.errors import OutputExists, VerificationError
from gradmap_hub.formats import FORMATS, ONNX
from gradmap_hub.layout import artifact, work_folder
from gradmap_hub.models.safetensors_files import read_config
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.progress import Reporter
from gradmap_hub.record import Artifact, Parity, Quality, RunRecord
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:
    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.exporters.export import Exported


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
    """Export to formats other than Optimum's float32 graph. A quantised file that exceeds the perplexity limit of its
    format is deleted.

    Args:
        names: The formats.
        rows: Held-out sequences, on which perplexity is measured.
        fit: Other sequences, (sequences, tokens), to fit the rounding on.
        keep_failing: Keep quantised files that exceed the limit.

    Returns:
        The record with the exported files.

    Raises:
        VerificationError: a float32 graph differs from PyTorch, or an exporter failed.
    """
    from gradmap_hub.exporters import environment, export

    environment.prepare(stages.reporter)
    destination, work = folder / "onnx", work_folder(folder) / "export"
    artifacts = [entry for entry in record.artifacts if entry.format not in names]
    try:
        for name in names:
            exported = _stage(stages, folder, destination, work, name, rows, fit, keep_failing=keep_failing)
            if exported.note:
                stages.reporter.note(exported.note)
            if not FORMATS[name].may_fail and not exported.check.passed:
                raise VerificationError(
                    f"The {name} export differs from PyTorch: {exported.check.reason}.",
                    hint="It is not published; leave out this format.",
                )
            artifacts += _artifacts(exported, folder, rows)
    finally:
        export.clear(work)
    return dataclasses.replace(record, artifacts=artifacts, timings=record.timings | stages.timings)


def onnx_stage(stages: Stages, name: str, title: str, checkpoint: Path, destination: Path) -> Parity:
    """Export a checkpoint with Optimum to float32 and compare the graph with PyTorch, as a resumable stage.

    Args:
        name: The name of the stage.
        title: Its title for the reporter.
        checkpoint: The folder of the checkpoint.
        destination: The folder of the graph.

    Returns:
        How far the outputs of graph and checkpoint differ.

    Raises:
        VerificationError: the export failed, or differs from PyTorch.
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
    """Export the original for the Space that compares it with the pruned model.

    Args:
        checkpoint: The folder of the original.
        names: The formats.
        rows: Held-out sequences, on which perplexity is measured.
        work: A folder for files that the formats share; removed at the end.
        fit: Other sequences, (sequences, tokens), to fit the rounding on.

    Returns:
        The quality of each format that passed its check; the files of others are deleted.

    Raises:
        VerificationError: an exporter failed.
    """
    from gradmap_hub.exporters import environment, export, genai

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
        (destination / genai.CONFIG).unlink(missing_ok=True)  # not used by the Space
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
        describe=_export_summary,
    )


def _files(destination: Path, name: str) -> list[Path]:
    graph = destination / FORMATS[name].file
    return [graph, graph.with_name(graph.name + "_data")]


def remove_exports(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of formats that this run does not make; an earlier run may have removed other layers."""
    from gradmap_hub.exporters import genai

    for name in names:
        for path in _files(folder / "onnx", name):
            path.unlink(missing_ok=True)
    config = folder / "onnx" / genai.CONFIG
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
        if not (config.parent / named).is_file():
            config.unlink()


def _export_summary(exported: Exported) -> str:
    if not exported.files:
        return "failed the check, deleted"
    check = exported.check
    return f"{exported.bytes / 1e6:.1f} MB, perplexity {100 * (check.ratio - 1):+.1f} % against the checkpoint"


def _artifacts(exported: Exported, folder: Path, rows: Rows) -> list[Artifact]:
    found = []
    for name in exported.files:
        entry = artifact(folder / "onnx" / name, folder, exported.format, None)
        if name.endswith(".onnx"):
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


# Sequences of the text, and tokens of each, on which the export of a finished folder is measured.
EXPORT_ROWS, EXPORT_TOKENS = 8, 512


def export_folder(
    folder: Path,
    formats: Sequence[str],
    *,
    text: str = DEFAULT_CALIBRATION,
    keep_failing: bool = False,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> RunRecord:
    """Export a pruned folder and update its record and card.

    Args:
        formats: Names of formats, see `gradmap_hub.formats`.
        text: A file or a data set of the Hub on which the perplexity of all formats but `onnx` is measured; preferably
            not a calibration text of the model.
        keep_failing: Keep quantised files that exceed the perplexity limit of their format.

    Returns:
        The updated record.

    Raises:
        GradmapError: a format is unknown or not available for the model; a package or the text is missing; a check
            failed.
    """
    from gradmap_hub.exporters.export import require

    record = RunRecord.read(folder)
    config = read_config(folder / "config.json")
    for name in formats:
        require(name, config)
    hub, reporter = connect(hub, reporter)
    checked = [name for name in formats if name != ONNX]
    rows = _export_rows(folder, text, hub) if checked else None
    if not folder.is_dir():
        raise OutputExists(f"{folder} is not a folder.")
    stages = Stages(work_folder(folder), reporter, {"version": __version__, "what": "export"})
    if ONNX in formats:
        record = export_optimum(folder, record, stages)
    if rows is not None:
        record = export_checked(folder, record, stages, checked, rows, keep_failing=keep_failing)
    return write_results(record, folder, reporter)


def _export_rows(folder: Path, source: str, hub: Hub) -> Rows:
    from transformers import AutoTokenizer

    from gradmap_hub.data.rows import evaluation_rows

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = read_config(folder / "config.json").get("max_position_embeddings")
    tokens = min(EXPORT_TOKENS, longest) if isinstance(longest, int) else EXPORT_TOKENS
    return evaluation_rows(text_of(source, hub), tokenizer, seq_len=tokens, rows=EXPORT_ROWS)


def remove_onnx(folder: Path) -> None:
    """Remove all ONNX files of a model folder."""
    for name in ("onnx", "onnx.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def export_optimum(folder: Path, record: RunRecord, stages: Stages) -> RunRecord:
    """Export the checkpoint of a folder with Optimum to float32.

    Returns:
        The record with the exported files.

    Raises:
        VerificationError: the export failed, or differs from PyTorch.
    """
    from gradmap_hub.exporters import onnx

    destination = folder / "onnx"
    parity = onnx_stage(stages, "onnx", "Exporting to ONNX, comparing with PyTorch", folder, destination)
    artifacts = [entry for entry in record.artifacts if entry.format != "onnx"]
    for path in onnx.file_names(destination):
        if path.suffix != ".json":
            artifacts.append(artifact(path, folder, "onnx", parity if path.name == onnx.MODEL else None))
    timings = record.timings | stages.timings
    return dataclasses.replace(record, artifacts=artifacts, timings=timings)
