"""Exports beside Optimum's float32 graph: checked against the checkpoint, resumable, in the record if they passed."""

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
    """Export to each of `names`; a quantised file that costs more perplexity than its format may is deleted, and the
    run goes on. `rows`: held out, what perplexity is measured on; `fit` (rows, tokens): others, to round by.

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
                    hint="It is not published; leave this format out.",
                )
            artifacts += _artifacts(exported, folder, rows)
    finally:
        export.clear(work)
    return dataclasses.replace(record, artifacts=artifacts, timings=record.timings | stages.timings)


def onnx_stage(stages: Stages, name: str, title: str, checkpoint: Path, destination: Path) -> Parity:
    """Optimum's float32 graph of a checkpoint, exported into a folder and compared with PyTorch, as a resumable stage.

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
    """Export the original to `names` in the same way, for the Space that compares it with the pruned model.

    Returns what each costs; a format that failed its check is not among them and left no file. `work`: a folder for
    what the formats share, which is removed.

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
        (destination / genai.CONFIG).unlink(missing_ok=True)  # for another program than the Space
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
        describe=_in_words,
    )


def _files(destination: Path, name: str) -> list[Path]:
    graph = destination / FORMATS[name].file
    return [graph, graph.with_name(graph.name + "_data")]


def remove_exports(folder: Path, names: Sequence[str]) -> None:
    """Files of formats that this run was not asked for: an earlier run's, perhaps of other layers."""
    from gradmap_hub.exporters import genai

    for name in names:
        for path in _files(folder / "onnx", name):
            path.unlink(missing_ok=True)
    config = folder / "onnx" / genai.CONFIG
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
        if not (config.parent / named).is_file():
            config.unlink()


def _in_words(exported: Exported) -> str:
    if not exported.files:
        return "not passed, not kept"
    check = exported.check
    return f"{exported.bytes / 1e6:.1f} MB, perplexity {100 * (check.ratio - 1):+.1f} % of the checkpoint's"


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


# Held-out rows that an export of a finished folder is measured on.
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
    """Export a pruned folder; its record and card are written anew with what was exported.

    `text`: what perplexity of the formats beside `onnx` is measured on, a file or a data set of the Hub; better none
    that the model was calibrated on. `keep_failing`: leave quantised files in place that cost too much of it.

    Raises:
        GradmapError: a format is unknown, or not for this model; a package or the text is missing; a check failed.
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
    for name in ("onnx", "onnx.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def export_optimum(folder: Path, record: RunRecord, stages: Stages) -> RunRecord:
    from gradmap_hub.exporters import onnx

    destination = folder / "onnx"
    parity = onnx_stage(stages, "onnx", "Exporting to ONNX, comparing with PyTorch", folder, destination)
    artifacts = [entry for entry in record.artifacts if entry.format != "onnx"]
    for path in onnx.file_names(destination):
        if path.suffix != ".json":
            artifacts.append(artifact(path, folder, "onnx", parity if path.name == onnx.MODEL else None))
    timings = record.timings | stages.timings
    return dataclasses.replace(record, artifacts=artifacts, timings=timings)
