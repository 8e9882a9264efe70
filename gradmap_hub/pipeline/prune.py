"""`prune`: writes a pruned checkpoint with its record and card into a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import Expected, PruneConfig, PruneMethod
from gradmap_hub.data.texts import check_texts, is_local_text
from gradmap_hub.evaluation.staleness import with_earlier
from gradmap_hub.layout import check_disk, check_output, weight_artifacts
from gradmap_hub.machine import hardware, versions
from gradmap_hub.models.source import check_family, find_source
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.heal import forget_teacher, heal
from gradmap_hub.pipeline.reproduce import check_expected
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.pipeline.run import Run, exclusive, no_empty_folders
from gradmap_hub.pipeline.stages import (
    RowLosses,
    compensate,
    evaluation_record,
    fetch_weights,
    losses_without,
    score,
    select,
    texts_inputs,
)
from gradmap_hub.pipeline.texts import calibrate, calibration_record, evaluation_texts
from gradmap_hub.pipeline.writing import write
from gradmap_hub.progress import Reporter
from gradmap_hub.record import SCHEMA_VERSION, RunRecord

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.hub.client import Hub


def prune(
    model: str,
    output: Path,
    config: PruneConfig,
    *,
    revision: str | None = None,
    resume: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
    hub: Hub | None = None,
    repeats: Expected | None = None,
) -> RunRecord:
    """Prune `model` into the folder `output`: checkpoint, tokenizer, card, gradmap.json.

    Args:
        model: A Hub id, a local folder or a .gguf file.
        output: Folder for the result; new or empty.
        config: How to prune, and how much.
        revision: Branch, tag or commit of the original.
        resume: Continue an unfinished run in `output`.
        command: The command line, for the record.
        repeats: Commit and checksums of an earlier run that must match.

    Returns:
        The record, as written to gradmap.json.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub, reporter = connect(hub, reporter)
    check_output(output, resume)
    check_texts(config)
    source = find_source(model, revision, hub)
    check_family(source, config)
    check_expected(source, repeats)
    config.removals(source.layer_count)  # raises if there are too many
    check_disk(output, source.weight_bytes * 2)
    with no_empty_folders(output), exclusive(output):
        run = Run(source, config, output, hub, reporter, command=command, expected=repeats)
        return write_results(with_earlier(prune_stages(run, config), output), output, reporter)


@dataclass(frozen=True)
class _BothLosses:
    """Per evaluation text, the mean NLL of each sequence in nats per token: of the original, and of the pruned model
    before compensation."""

    original: list[list[float]]
    pruned: list[list[float]]


def prune_stages(run: Run, config: PruneConfig, *, target: str | None = None, license: str | None = None) -> RunRecord:
    """Run the stages of pruning in order; the result of each is on disk before the next begins.

    Args:
        run: The context of the run.
        config: How to prune, and how much.
        target: The repository to publish to, if known.
        license: The licence stated by the publisher, for an original that states none.

    Returns:
        The record, which is not written yet.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.pruning.candidates import decide

    run.precision()  # raises before the download if the machine does not support it
    run.output.mkdir(parents=True, exist_ok=True)
    removals = config.removals(run.source.layer_count)
    rows, extra = calibrate(run)
    texts = evaluation_texts(run, rows, extra)
    weights = fetch_weights(run)
    scores = score(run, rows)
    chosen = compensate(run, rows, select(run, rows, scores, removals, config.drop))
    losses = _evaluate_original(run, chosen.removed, [text.rows for text in texts])
    healed = heal(run, rows, chosen)
    forget_teacher(run)
    written = write(run, chosen.removed, chosen.compensation, healed)
    compensated = _evaluate_written(run, [text.rows for text in texts])
    winner = chosen.winner
    why = "lowest held-out loss of the candidates" if len(chosen.candidates) > 1 else "lowest score"
    base = dataclasses.replace(run.source.base, weights_sha256=weights.sha256)
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        gradmap_hub=__version__,
        command=run.command,
        name=run.output.resolve().name,
        base=base if base.license else dataclasses.replace(base, license=license, license_source="publisher"),
        layers=decide(scores, winner, chosen.removed, why),
        removed=chosen.removed,
        ratio=config.ratio if config.ratio is not None else removals / run.source.layer_count,
        parameters=written.parameters,
        bytes=written.bytes,
        metric=winner.name if winner else "chosen by hand",
        schedule=config.schedule,
        calibration=calibration_record(run, rows),
        compensation=chosen.compensation,
        seed=config.seed,
        candidates=chosen.candidates,
        verification=written.verification,
        evaluation=evaluation_record(run, texts, losses.original, losses.pruned, compensated.rows),
        artifacts=weight_artifacts(run.output),
        target=target,
        dtype=written.dtype,
        versions=versions(),
        timings=dict(run.stages.timings),
        hardware=hardware(),
        heal=healed,
        settings=settings_of(run, config, rows, extra),
        unused_tensors=weights.unused,
    )


def _evaluate_original(run: Run, removed: Sequence[int], texts: Sequence[Rows]) -> _BothLosses:
    def compute() -> _BothLosses:
        run.reporter.total(2 * sum(len(text.ids) for text in texts))
        both = losses_without(run, [(), removed], texts)
        return _BothLosses(both[0], both[1])

    return run.stages.run(
        "evaluate-original",
        "Measuring the original and the pruned model",
        _BothLosses,
        compute,
        inputs=texts_inputs(run, texts),
    )


def _evaluate_written(run: Run, texts: Sequence[Rows]) -> RowLosses:
    """Losses of the written checkpoint, loaded again."""

    def compute() -> RowLosses:
        decoder = run.open(run.output)
        run.reporter.total(sum(len(text.ids) for text in texts))
        return RowLosses([decoder.losses(text.ids, None, run.reporter.advance) for text in texts])

    run.release()
    return run.stages.run("evaluate-written", "Measuring the result", RowLosses, compute)


def settings_of(run: Run, config: PruneMethod, rows: CalibrationRows, extra: Sequence[Rows]) -> dict[str, Any]:
    """All options of the run as the record has them, for `--from`: texts by their published names, "auto" resolved."""
    dtype, device = run.precision()
    settings = dataclasses.asdict(config) | {
        "calibration": [text.name for text in rows.sources],
        "eval_text": [text.name for text in extra],
        "heal_text": [Path(name).name if is_local_text(name) else name for name in config.heal_text],
        "compute": str(dtype).removeprefix("torch."),
        "device": device,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
