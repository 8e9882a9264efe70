"""`sweep`: measures the result of `prune` at several ratios without writing checkpoints.

All ratios share texts, weights, the scoring pass and the losses of the original. Each number of layers is a branch (see
`Run.branch`) with the stages of `prune`: select, compensate, heal. The changed weights are in the model only during the
measurement. Every result is stored at once and is not computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import __version__
from gradmap_hub.config import SweepConfig
from gradmap_hub.data.texts import check_texts
from gradmap_hub.errors import OutputExists
from gradmap_hub.evaluation.speed import Speed
from gradmap_hub.layout import check_disk
from gradmap_hub.machine import hardware, versions
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.source import Source, find_source
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.heal import forget_teacher, heal
from gradmap_hub.pipeline.prune import settings_of
from gradmap_hub.pipeline.run import Run, exclusive, no_empty_folders
from gradmap_hub.pipeline.stages import (
    RowLosses,
    compensate,
    evaluation_record,
    fetch_weights,
    losses_without,
    new_values,
    score,
    select,
    texts_inputs,
)
from gradmap_hub.pipeline.texts import EvaluationText, calibrate, calibration_record, evaluation_texts
from gradmap_hub.progress import Reporter
from gradmap_hub.pruning.prune_model import Compensated
from gradmap_hub.record import HealRecord
from gradmap_hub.sweeping.knee import recommend
from gradmap_hub.sweeping.record import SWEEP_FILE, SWEEP_VERSION, SweepPoint, SweepRecord
from gradmap_hub.sweeping.report import write_report
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.pruning.scores import LayerScores

NOT_ASKED_FOR = "not requested"
STREAMED = "with --low-memory the weights are read from disk, so it would be the speed of the disk"


@dataclass(frozen=True)
class _Pruned:
    """Per evaluation text, the mean NLL of each sequence in nats per token, without and with the changed weights."""

    uncorrected: list[list[float]]
    corrected: list[list[float]]


@dataclass(frozen=True)
class _Size:
    """Sizes before and after. `bytes`: of the original's files, and of the tensors of the unwritten checkpoint."""

    parameters: BeforeAfter
    bytes: BeforeAfter


@dataclass(frozen=True)
class _Shared:
    """The results that all ratios share. `original`: losses of the original on `texts`."""

    rows: CalibrationRows
    scores: LayerScores
    texts: Sequence[EvaluationText]
    original: RowLosses


def default_sweep_output(model: str) -> Path:
    """The default output folder: NAME-sweep in the current folder."""
    return Path(f"{Path(model).stem if model.endswith('.gguf') else Path(model).name}-sweep")


def check_sweep_output(output: Path, source: Source) -> None:
    """Check that the folder is new, empty, or has a sweep of the same model.

    Raises:
        OutputExists: it has other files, or a sweep of another model.
    """
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file.", hint="Choose another folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / SWEEP_FILE).is_file():
        raise OutputExists(f"The folder {output} is not empty; it was left unchanged.", hint="Choose another folder.")
    there = SweepRecord.read(output).base
    if (there.name, there.repo_id) != (source.base.name, source.base.repo_id):
        raise OutputExists(
            f"The folder {output} holds a sweep of {there.name}; it was left unchanged.", hint="Choose another folder."
        )


def sweep(
    config: SweepConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub | None = None
) -> tuple[SweepRecord, Path]:
    """Measure quality, size and speed of a model at several ratios.

    The tables are updated after every ratio, the figure is written after the last. Results of an earlier sweep of the
    same model are not computed again.

    Args:
        config: The model, the ratios and how to prune.
        command: The command line, for the record.

    Returns:
        The record and its folder.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub, reporter = connect(hub, reporter)
    output = config.output or default_sweep_output(config.model)
    check_texts(config.prune)
    source = find_source(config.model, config.revision, hub)
    check_sweep_output(output, source)
    check_disk(output, 0 if source.folder is not None else source.weight_bytes)
    with no_empty_folders(output), exclusive(output):
        run = Run(source, config.prune, output, hub, reporter, command=command, kind="sweep")
        records = sweep_stages(run, config)
        record = next(records)
        write_report(record, output)
        for record in records:
            write_report(record, output)
    return record, output


def sweep_stages(run: Run, config: SweepConfig) -> Iterator[SweepRecord]:
    """Measure each number of removed layers, in ascending order; yields the record so far after each.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    run.precision()  # raises before the download if the machine does not support it
    rows, extra = calibrate(run)
    texts = evaluation_texts(run, rows, extra)
    weights = fetch_weights(run)
    scores = score(run, rows)
    shared = _Shared(rows, scores, texts, _evaluate_original(run, [text.rows for text in texts]))
    settings = settings_of(run, config.prune, rows, extra)
    counts = config.ratios_by_count(run.source.layer_count)
    points: list[SweepPoint] = []
    no_speed = NOT_ASKED_FOR if not config.speed else STREAMED if config.prune.low_memory else ""
    if no_speed == STREAMED:
        run.reporter.note(f"Speed is not measured: {STREAMED}.")
    for count, ratios in counts.items():
        points.append(_measure(run, shared, count, ratios, timed=not no_speed))
        found = recommend(points, config.max_loss)
        push = config.push_command(found.ratio) if found.ratio is not None else ""
        yield SweepRecord(
            schema_version=SWEEP_VERSION,
            gradmap_hub=__version__,
            command=run.command,
            base=dataclasses.replace(run.source.base, weights_sha256=weights.sha256),
            ratios=sorted(set(config.ratios)),
            settings=settings,
            calibration=calibration_record(run, rows),
            points=list(points),
            recommendation=dataclasses.replace(found, push=push),
            no_speed=no_speed,
            versions=versions(),
            hardware=hardware(),
            seconds=dict(run.stages.timings),
        )
    forget_teacher(run)


def _measure(run: Run, shared: _Shared, count: int, ratios: Sequence[float], *, timed: bool) -> SweepPoint:
    from gradmap_hub.evaluation.metrics import perplexity, ratio_interval

    branch = run.branch(f"without-{count}", f"Without {count} of {run.source.layer_count} layers: ")
    rows = shared.rows
    chosen = compensate(branch, rows, select(branch, rows, shared.scores, count))
    healed = heal(branch, rows, chosen)
    weights = _size(branch, chosen.removed)
    pruned = _evaluate(branch, chosen, healed, [text.rows for text in shared.texts])
    speed = _time(branch, chosen.removed, rows) if timed else None
    original, uncorrected, corrected = (
        [loss for text in texts for loss in text]
        for texts in (shared.original.rows, pruned.uncorrected, pruned.corrected)
    )
    base = perplexity(original)
    assert chosen.winner is not None  # None only if the layers were chosen by hand
    return SweepPoint(
        ratios=list(ratios),
        removed=chosen.removed,
        layers=BeforeAfter(run.source.layer_count, run.source.layer_count - count),
        parameters=weights.parameters,
        bytes=weights.bytes,
        metric=chosen.winner.name,
        perplexity=perplexity(corrected) / base,
        interval=ratio_interval(original, corrected),
        uncorrected=perplexity(uncorrected) / base,
        evaluation=evaluation_record(run, shared.texts, shared.original.rows, pruned.uncorrected, pruned.corrected),
        candidates=chosen.candidates,
        compensation=chosen.compensation,
        heal=healed,
        speed=speed,
        seconds=dict(branch.stages.timings),
    )


def _evaluate_original(run: Run, texts: Sequence[Rows]) -> RowLosses:
    def compute() -> RowLosses:
        run.reporter.total(sum(len(text.ids) for text in texts))
        return RowLosses(losses_without(run, [()], texts)[0])

    # On a branch, so that other evaluation texts do not invalidate selection and compensation.
    return run.stages.branch().run(
        "evaluate-original", "Measuring the original", RowLosses, compute, inputs=texts_inputs(run, texts)
    )


def _evaluate(run: Run, chosen: Compensated, healed: HealRecord | None, texts: Sequence[Rows]) -> _Pruned:
    """The losses of the pruned model without and with the changed weights."""

    def compute() -> _Pruned:
        from gradmap_hub.pruning.removal import storage_dtype

        decoder = run.decoder()
        overrides = new_values(run, chosen.compensation, healed)
        run.reporter.total(sum(len(text.ids) for text in texts) * (2 if overrides else 1))
        uncorrected = losses_without(run, [chosen.removed], texts)[0]
        if not overrides:
            return _Pruned(uncorrected, uncorrected)
        stored = storage_dtype(run.method.dtype, run.source.base.dtype)
        with ExitStack() as replaced:
            for (layer, name), value in overrides.items():
                # as in a checkpoint that is read back
                rounded = value.to(stored).to(run.precision()[0]).to(decoder.device)
                replaced.enter_context(decoder.replaced(layer, {name: rounded}))
            return _Pruned(uncorrected, losses_without(run, [chosen.removed], texts)[0])

    inputs = {**texts_inputs(run, texts), "dtype": run.method.dtype}
    return run.stages.run("evaluate", "Measuring perplexity", _Pruned, compute, inputs=inputs)


def _size(run: Run, removed: Sequence[int]) -> _Size:
    def compute() -> _Size:
        from gradmap_hub.models.checkpoint import checkpoint_bytes
        from gradmap_hub.pruning.removal import parameter_count, storage_dtype

        decoder = run.decoder()
        before = parameter_count(decoder.model)
        after = before - sum(parameter_count(decoder.layers[layer]) for layer in removed)
        stored = storage_dtype(run.method.dtype, run.source.base.dtype)
        return _Size(
            BeforeAfter(before, after),
            BeforeAfter(checkpoint_bytes(run.original.checkpoint()), after * stored.itemsize),
        )

    # On a branch, because no later stage depends on the stored dtype.
    return run.stages.branch().run(
        "size",
        "Size",
        _Size,
        compute,
        inputs={"dtype": run.method.dtype},
        describe=lambda found: f"{size(found.bytes.before)} -> {size(found.bytes.after)}",
    )


def _time(run: Run, removed: Sequence[int], rows: CalibrationRows) -> Speed:
    """Speed relative to the original, on the loaded model, with the layers left out temporarily."""
    from gradmap_hub.evaluation import speed

    dtype, device = run.precision()
    positions = run.source.config.get("max_position_embeddings")
    room = positions if isinstance(positions, int) else speed.PROMPT_TOKENS + speed.NEW_TOKENS
    new_tokens = min(speed.NEW_TOKENS, room // 2)
    prompt = rows.fit.flatten()[: min(speed.PROMPT_TOKENS, room - new_tokens)]

    def compute() -> Speed:
        from gradmap_hub.pruning.removal import layers_left_out

        model = run.decoder().model
        run.reporter.total(2 * (speed.ROUNDS + 1))
        return speed.against_original(
            model,
            lambda: layers_left_out(model, run.source.architecture, removed),
            prompt.tolist(),
            new_tokens=new_tokens,
            done=run.reporter.advance,
        )

    return run.stages.branch().run(
        "speed",
        "Timing against the original",
        Speed,
        compute,
        inputs={"hardware": hardware(), "precision": [str(dtype), device], "tokens": [len(prompt), new_tokens]},
        describe=lambda found: f"prefill x{found.prefill.ratio:.2f}, decode x{found.decode.ratio:.2f}",
    )
