"""`heal`: trains a finished folder further, with its original as the teacher, and updates exports, record and card."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import distributed
from gradmap_hub.config import SELF, Expected, PruneMethod
from gradmap_hub.data.texts import check_text_files
from gradmap_hub.errors import SourceError
from gradmap_hub.files import write_text
from gradmap_hub.folder_config import HealConfig
from gradmap_hub.formats import ONNX
from gradmap_hub.layout import (
    COMPANION_FILES,
    CONFIG,
    WEIGHTS_INDEX,
    check_disk,
    extra_templates,
    sha256_of,
    weight_artifacts,
    work_folder,
)
from gradmap_hub.models.source import check_family
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.export import export_checked, export_optimum
from gradmap_hub.pipeline.heal import forget_teacher, heal_stage, open_float32
from gradmap_hub.pipeline.recorded import find_original
from gradmap_hub.pipeline.reproduce import find_calibration, find_evaluation
from gradmap_hub.pipeline.results import read_folder, write_results
from gradmap_hub.pipeline.run import Run, exclusive, no_empty_folders
from gradmap_hub.pipeline.stages import (
    HEALED_FILE,
    RowLosses,
    evaluation_record,
    fetch_weights,
    load_overrides,
    losses_without,
    texts_inputs,
)
from gradmap_hub.pipeline.texts import calibrate, evaluation_texts
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.record import FILE_NAME, HealRecord, RunRecord, VerificationRecord, read_record, to_json

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor, nn

    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.texts import EvaluationText

# In the work folder: the stages of a healing; in it the new checkpoint with its exports, and the record of a healing
# whose files are being moved.
_STAGES, _BUILT, _PENDING = "heal", "built", "record.json"
# Settings of the folder's run that a healing keeps.
_KEPT = ("samples", "seq_len", "eval_rows", "seed", "compute", "device")


@dataclass(frozen=True)
class _Losses:
    """Per evaluation text, the mean NLL of each sequence in nats per token: of the original, and of the folder after
    compensation, before this healing."""

    original: list[list[float]]
    before: list[list[float]]


def heal_folder(
    folder: Path,
    config: HealConfig,
    *,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> RunRecord:
    """Heal a finished folder: replace its weights, exports, record and card together.

    The folder stays unchanged until the training has ended and has clearly lowered the held-out divergence. An
    interrupted run is resumed. With `accelerate launch`, all processes train together and the main one does everything
    else.

    Args:
        folder: A folder made by prune or push.
        config: The budget, the texts, the part of the weights, and the original.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    distributed.join()
    hub, reporter = connect(hub, reporter)
    folder = folder if folder.name else folder.resolve()  # "." has no folder beside it
    read_folder(folder)  # raises before anything is written beside a folder that is not a result
    with no_empty_folders(folder), exclusive(folder) if distributed.is_main() else nullcontext():
        return _heal(folder, config, reporter, hub)


def _heal(folder: Path, config: HealConfig, reporter: Reporter, hub: Hub) -> RunRecord:
    distributed.main_first(lambda: _finish_earlier(folder))
    record = read_folder(folder)
    check_text_files(name for name in config.text if name != SELF)
    weights = _check_unchanged(record, folder)
    source = find_original(folder, record, config.against, hub)
    method = _method(record, folder, config)
    check_family(source, method)
    check_disk(folder, 2 * sum(entry.bytes for entry in record.artifacts))
    # Stages of their own: the results of the folder's run stay as they are.
    # Other texts are compared by their checksum; this one is written again.
    expected = Expected(rows_sha256=record.calibration.sha256 if SELF in method.calibration else None)
    run = Run(source, method, folder, hub, reporter, kind="heal", of=weights, expected=expected).branch(_STAGES, "")
    distributed.main_first(run.original.companions)  # it may write a form of them that transformers reads
    rows, extra = calibrate(run)
    texts = evaluation_texts(run, rows, extra)
    fetch_weights(run)
    healed = heal_stage(run, rows, record.removed, lambda: _open_folder(run, folder))
    distributed.leave()
    if not distributed.is_main():
        return record
    forget_teacher(run)
    if not healed.applied:
        reporter.note(f"The folder is unchanged: {healed.reason}.")
        return record
    losses = _losses(run, folder, [text.rows for text in texts])
    built = run.work / _BUILT
    record = _with_weights(run, record, healed, built)
    record = _measured(run, record, texts, losses, built)
    record = _export_again(run, record, rows, extra, built)
    record = dataclasses.replace(record, timings=record.timings | run.stages.timings)
    write_text(run.work / _PENDING, to_json(record))  # from here on, an interrupted run ends as healed
    return _install(folder, record, reporter)


def _finish_earlier(folder: Path) -> None:
    """Finish a healing that was interrupted while it moved its files into the folder."""
    pending = work_folder(folder) / _STAGES / _PENDING
    if pending.is_file():
        _install(folder, read_record(pending), SilentReporter())


def _install(folder: Path, record: RunRecord, reporter: Reporter) -> RunRecord:
    """Move the new files into the folder, remove recorded files without a new version, and write record and card."""
    work = work_folder(folder) / _STAGES
    built = work / _BUILT
    for path in sorted(built.rglob("*")) if built.is_dir() else []:
        if path.is_file() and (path.suffix == ".safetensors" or path.parent != built or path.name == WEIGHTS_INDEX):
            place = folder / path.relative_to(built)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
    new = {entry.path for entry in record.artifacts}
    for entry in RunRecord.read(folder).artifacts:
        if entry.path not in new:
            (folder / entry.path).unlink(missing_ok=True)
    written = write_results(record, folder, reporter)
    (work / _PENDING).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    return written


def _check_unchanged(record: RunRecord, folder: Path) -> list[str]:
    """The sha256 of each weight file, checked against the record.

    Raises:
        SourceError: a file is missing or differs from the record.
    """
    weights = [entry for entry in record.artifacts if entry.format == "safetensors"]
    for entry in weights:
        path = folder / entry.path
        if not path.is_file() or sha256_of(path) != entry.sha256:
            raise SourceError(
                f"{entry.path} in {folder} is not the file that {FILE_NAME} describes.",
                hint="Recreate the folder with `gradmap-hub prune`, or finish its run with --resume.",
            )
    return [entry.sha256 for entry in weights]


def _method(record: RunRecord, folder: Path, config: HealConfig) -> PruneMethod:
    """The settings of the folder's run with this healing. The texts are those of the run: its held-out sequences stay
    held out, and the perplexities of the card are measured again on the same ones.

    Raises:
        SourceError: the record has no settings.
        CalibrationError: a text of the run is missing, or has changed.
    """
    places = [
        folder,
        folder.resolve().parent,
        Path.cwd(),
        *(Path(name).expanduser().parent for name in config.text if name != SELF),
    ]
    calibration = find_calibration(record, places)
    evaluation = find_evaluation(record, places)
    settings = record.settings or {}
    return PruneMethod(
        calibration=calibration,
        eval_text=evaluation,
        heal=config.budget,
        heal_text=config.text,
        heal_part=config.part,
        **{name: settings[name] for name in _KEPT if name in settings},
    )


def _open_folder(run: Run, folder: Path) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    decoder = open_float32(run, folder)
    return decoder.model, decoder.head


def _losses(run: Run, folder: Path, texts: Sequence[Rows]) -> _Losses:
    """The losses of the original and of the folder, measured before the weights change."""

    def compute() -> _Losses:
        run.reporter.total(2 * sum(len(text.ids) for text in texts))
        original = losses_without(run, [()], texts)[0]
        run.release()
        decoder = run.open(folder)
        return _Losses(original, [decoder.losses(text.ids, None, run.reporter.advance) for text in texts])

    return run.stages.run(
        "evaluate-before", "Measuring the original and the folder", _Losses, compute, inputs=texts_inputs(run, texts)
    )


def _with_weights(run: Run, record: RunRecord, healed: HealRecord, built: Path) -> RunRecord:
    """Write a checkpoint with the healed weights into the folder `built` and verify it."""
    folder = run.output

    def compute() -> VerificationRecord:
        import torch

        from gradmap_hub.models import checkpoint
        from gradmap_hub.pruning.verification import logits_of, probe_ids, verify

        shutil.rmtree(built, ignore_errors=True)
        built.mkdir(parents=True)
        model, _ = checkpoint.load_model(folder)
        kept = [layer for layer in range(record.layers_before) if layer not in set(record.removed)]
        layers = model.get_submodule(run.source.architecture.layers)
        with torch.no_grad():
            for (layer, name), value in load_overrides(run.work / HEALED_FILE).items():
                layers[kept.index(layer)].get_parameter(name).copy_(value)
        checkpoint.save_checkpoint(model, built, getattr(torch, record.dtype))
        checkpoint.cast_parameters(model, torch.float32)
        expected = logits_of(model, probe_ids(model.config))
        del model
        reloaded, report = checkpoint.load_model(built)
        checkpoint.copy_companions(folder, built, [*COMPANION_FILES, *extra_templates(folder)])
        return verify(reloaded, report, built, expected)

    run.release()
    verification = run.stages.run(
        "write-healed",
        "Writing and verifying the checkpoint",
        VerificationRecord,
        compute,
        files=lambda: [built / CONFIG, *sorted(built.glob("*.safetensors"))],
        describe=lambda _: "logits read back equal",
    )
    artifacts = [entry for entry in record.artifacts if entry.format != "safetensors"]
    return dataclasses.replace(
        record,
        heal=healed if record.heal is None else _both(record.heal, healed),
        verification=verification,
        artifacts=weight_artifacts(built) + artifacts,
    )


def _both(first: HealRecord, second: HealRecord) -> HealRecord:
    """The record of two healings, one after the other."""
    if not first.applied:
        return second
    checks = [
        dataclasses.replace(check, step=check.step + first.steps, tokens=check.tokens + first.tokens)
        for check in second.checks
    ]
    return dataclasses.replace(
        second,
        steps=first.steps + second.steps,
        tokens=first.tokens + second.tokens,
        seconds=first.seconds + second.seconds,
        layers=sorted({*first.layers, *second.layers}),
        checks=first.checks + checks,
        loss_before=first.loss_before,
        divergence_before=first.divergence_before or second.divergence_before,
    )


def _measured(run: Run, record: RunRecord, texts: Sequence[EvaluationText], losses: _Losses, built: Path) -> RunRecord:
    """The record with the perplexities of the healed weights; those of the pruned model before compensation stay."""

    def compute() -> RowLosses:
        decoder = run.open(built)
        run.reporter.total(sum(len(text.rows.ids) for text in texts))
        return RowLosses([decoder.losses(text.rows.ids, None, run.reporter.advance) for text in texts])

    run.release()
    after = run.stages.run("evaluate-healed", "Measuring the result", RowLosses, compute)
    found = evaluation_record(run, texts, losses.original, losses.before, after.rows)
    earlier = {text.name: text for text in record.evaluation.texts} if record.evaluation is not None else {}
    texts_found = [
        dataclasses.replace(text, pruned=earlier[text.name].pruned) if text.name in earlier else text
        for text in found.texts
    ]
    uncompensated = texts_found[0].pruned
    return dataclasses.replace(
        record, evaluation=dataclasses.replace(found, texts=texts_found, uncompensated=uncompensated)
    )


def _export_again(run: Run, record: RunRecord, rows: CalibrationRows, extra: Sequence[Rows], built: Path) -> RunRecord:
    """Export the formats of the folder again, because its files come from the earlier weights."""
    formats = list(dict.fromkeys(entry.format for entry in record.artifacts if entry.format != "safetensors"))
    if ONNX in formats:
        record = export_optimum(built, record, run.stages)
    checked = [name for name in formats if name != ONNX]
    if checked:
        held_out = [*extra, *rows.held_out][0]
        record = export_checked(built, record, run.stages, checked, held_out, fit=rows.fit)
    return record
