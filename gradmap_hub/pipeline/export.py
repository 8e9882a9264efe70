"""Exports beside Optimum's float32 graph: checked against the checkpoint, resumable, in the record if they passed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.errors import VerificationError
from gradmap_hub.layout import artifact, work_folder
from gradmap_hub.record import Artifact, Parity, Quality, RunRecord
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.exporters.formats import Exported

_TITLES = {
    "int8": "Exporting to ONNX with 8-bit weights, comparing with PyTorch",
    "int4": "Exporting to ONNX with 4-bit weights, comparing with PyTorch",
    "genai": "Exporting GenAI's ONNX graph, comparing with PyTorch",
    "fp16": "Exporting to ONNX in float16, comparing with PyTorch",
}


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
    from gradmap_hub.exporters import environment, formats

    environment.prepare(stages.reporter)
    destination, work = folder / "onnx", work_folder(folder) / "export"
    artifacts = [entry for entry in record.artifacts if entry.format not in names]
    try:
        for name in names:
            exported = _stage(stages, folder, destination, work, name, rows, fit, keep_failing=keep_failing)
            if exported.note:
                stages.reporter.note(exported.note)
            if name not in formats.LADDERS and not exported.check.passed:
                raise VerificationError(
                    f"The {name} export differs from PyTorch: {exported.check.reason}.",
                    hint="It is not published; leave this format out.",
                )
            artifacts += _artifacts(exported, folder, rows)
    finally:
        formats.clear(work)
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
    from gradmap_hub.exporters import environment, formats, genai

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
        formats.clear(work)
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
    from gradmap_hub.exporters import formats
    from gradmap_hub.exporters.recipes import LADDERS

    destination.mkdir(parents=True, exist_ok=True)
    optimum = destination / formats.FILE_NAMES["onnx"]
    return stages.run(
        f"export-{name}-{of}" if of else f"export-{name}",
        f"The {of}: {_TITLES[name][0].lower()}{_TITLES[name][1:]}" if of else _TITLES[name],
        formats.Exported,
        lambda: formats.export(
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
    from gradmap_hub.exporters import formats

    graph = destination / formats.FILE_NAMES[name]
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
