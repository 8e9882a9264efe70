"""The story, top to bottom: pull, calibrate, score, select, compensate, write, verify, measure (`run.prune_stages`),
then export, card, Space, publish. Each stage's result is on disk before the next begins, so a run can be resumed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gradmap_hub import __version__
from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
    QUANTIZED,
    EvaluateConfig,
    Expected,
    PruneConfig,
    PublishConfig,
    PushConfig,
    SweepConfig,
)
from gradmap_hub.data.texts import check_texts, text_of
from gradmap_hub.errors import GradmapError, HubError, OutputExists, SourceError, SpaceImpossible
from gradmap_hub.evaluation.staleness import with_earlier, without_stale
from gradmap_hub.formats import GRAPHS
from gradmap_hub.layout import artifact, check_disk, check_output, space_folder_of, work_folder
from gradmap_hub.models.safetensors_files import read_config
from gradmap_hub.models.source import check_family, find_source
from gradmap_hub.pipeline import checks as planning
from gradmap_hub.pipeline import publish as publishplan
from gradmap_hub.pipeline.checks import PushPlan, Targets
from gradmap_hub.pipeline.export import export_checked, onnx_stage, remove_exports
from gradmap_hub.pipeline.publish import PublishPlan, look_through
from gradmap_hub.pipeline.reproduce import check_expected
from gradmap_hub.pipeline.run import Run, export_rows, inspect_stages, prune_stages
from gradmap_hub.pipeline.space import finished_space, remove_space, terms_of, write_space_folder
from gradmap_hub.pipeline.sweep import check_sweep_output, default_sweep_output, sweep_stages
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.record import Candidate, RunRecord
from gradmap_hub.space.plan import SpacePlan, plan_of, precisions_of
from gradmap_hub.stage_cache import Stages
from gradmap_hub.sweep.record import SweepRecord
from gradmap_hub.sweep.report import write_report
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.collections import Collected
    from gradmap_hub.hub.publisher import Checked, Published, Publisher
    from gradmap_hub.hub.space_watch import SpaceState
    from gradmap_hub.pruning.scoring import LayerScores

__all__ = [
    "Inspection",
    "PushResult",
    "build_space",
    "evaluate_folder",
    "export_folder",
    "inspect",
    "make_plan",
    "plan_publish",
    "prune",
    "publish_folder",
    "push",
    "sweep",
]

# Held-out rows that an export of a finished folder is measured on.
EXPORT_ROWS, EXPORT_TOKENS = 8, 512


@dataclass(frozen=True)
class PushResult:
    """What a push built and published. `space` is None if there is none, and `space_reason` says why; `space_state` is
    None if it was not looked at. `collection` is None if none was asked for, or `collection_reason` says why."""

    record: RunRecord
    folder: Path
    space_folder: Path | None
    model: Published
    space: Published | None
    space_reason: str
    space_state: SpaceState | None = None
    collection: Collected | None = None
    collection_reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """`choices`: for each ratio asked for, the set of layers that a cheap ranking would remove, with its loss."""

    scores: LayerScores
    choices: dict[float, Candidate]


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
    """Prune `model` into the folder `output`: checkpoint, tokenizer, card, gradmap.json. `repeats`: what must be found
    again for the result to be that of an earlier run.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub = _reporting(hub or _default_hub(), reporter)
    check_output(output, resume)
    check_texts(config)
    source = find_source(model, revision, hub)
    check_family(source, config)
    check_expected(source, repeats)
    removals = config.removals(source.layer_count)
    check_disk(output, source.weight_bytes * 2)
    with _no_empty_folders(output):
        run = Run(source, config, removals, output, command, reporter or SilentReporter(), hub, expected=repeats)
        return _write_card(with_earlier(prune_stages(run), output), output, run.reporter)


def make_plan(config: PushConfig, hub: Hub) -> PushPlan:
    """Everything that can be known before any work: what --dry-run prints.

    Raises:
        GradmapError: the first thing that would make the push fail later.
    """
    from gradmap_hub.hub.publisher import Publisher

    plan = planning.make_plan(config, hub, Publisher(hub))
    check_expected(plan.source, config.repeats)
    return plan


def push(config: PushConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub) -> PushResult:
    """Prune, export, write card and Space, publish both, and verify what was published.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.exporters import environment
    from gradmap_hub.hub.publisher import Publisher

    reporter = reporter or SilentReporter()
    _reporting(hub, reporter)
    plan = make_plan(config, hub)
    if config.onnx:
        environment.prepare(reporter)  # which fails before the work, if it fails
    with _no_empty_folders(plan.output):
        run = Run(
            plan.source, config.prune, plan.removals, plan.output, command, reporter, hub, expected=config.repeats
        )
        record = with_earlier(prune_stages(run, target=plan.target, license=plan.license), plan.output)
    rows = fit = None
    if config.onnx:
        record = _export_onnx(plan.output, record, run.stages)
        remove_exports(plan.output, [name for name in QUANTIZED if name not in config.quantize])
        if config.quantize:
            rows, fit = export_rows(run)
            record = export_checked(plan.output, record, run.stages, config.quantize, rows, fit=fit)
    else:  # an earlier run's, perhaps of other layers: what is published is what this run was asked for
        _remove_onnx(plan.output)
    if plan.space is not None:  # now that the sizes are known, and a format may have failed its check
        plan = _with_space(plan, plan_of(record))
    record = dataclasses.replace(record, space=plan.space_target if plan.space else None)
    record = _write_card(record, plan.output, reporter)
    space_folder = None
    if plan.space is not None:
        space_folder = space_folder_of(plan.output)
        written = write_space_folder(run, record, plan.space, space_folder, plan.target, rows, fit)
        plan = _with_space(plan, written)
        if plan.space is None:
            space_folder = None
            record = _write_card(dataclasses.replace(record, space=None), plan.output)
    if config.space and plan.space is None and remove_space(space_folder_of(plan.output), record):
        reporter.note("The Space folder of an earlier run of this push is removed: there is no Space any more.")
    return _publish_both(record, plan.output, space_folder, plan, config, Publisher(hub))


def _with_space(plan: PushPlan, space: SpacePlan) -> PushPlan:
    reason = "" if space.precisions else space.reason
    return dataclasses.replace(plan, space=None if reason else space, space_reason=reason)


def inspect(
    model: str,
    config: PruneConfig,
    *,
    ratios: Sequence[float] = (0.1, 0.25),
    revision: str | None = None,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> Inspection:
    """Score the layers of `model` and find what would go at each ratio; nothing is kept."""
    import tempfile

    hub = _reporting(hub or _default_hub(), reporter)
    check_texts(config)
    source = find_source(model, revision, hub)
    check_family(source, config)
    with tempfile.TemporaryDirectory(prefix="gradmap-inspect-") as scratch:
        run = Run(source, config, 1, Path(scratch) / "model", "", reporter or SilentReporter(), hub)
        return Inspection(*inspect_stages(run, ratios))


def sweep(
    config: SweepConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub | None = None
) -> tuple[SweepRecord, Path]:
    """Measure quality, size and speed of the model at several ratios; returns the record and the folder that holds it.

    The tables are written anew after every ratio, the figure after the last. What an earlier sweep of the same model
    left is not computed again.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub = _reporting(hub or _default_hub(), reporter)
    output = config.output or default_sweep_output(config.model)
    check_texts(config.prune)
    source = find_source(config.model, config.revision, hub)
    check_sweep_output(output, source)
    check_disk(output, 0 if source.folder is not None else source.weight_bytes)
    with _no_empty_folders(output):
        run = Run(source, config.prune, 1, output, command, reporter or SilentReporter(), hub, stages="sweep")
        records = sweep_stages(run, config)
        record = next(records)
        write_report(record, output)
        for record in records:
            write_report(record, output)
    return record, output


def plan_publish(folder: Path, config: PublishConfig, hub: Hub) -> PublishPlan:
    """Everything that can be known before anything is written or published: what `publish --dry-run` prints.

    Raises:
        GradmapError: the first thing that would make it fail.
    """
    from gradmap_hub.hub.publisher import Publisher

    return publishplan.plan_publish(folder, config, hub, Publisher(hub))


def publish_folder(
    folder: Path, config: PublishConfig | None = None, *, hub: Hub, reporter: Reporter | None = None
) -> PushResult:
    """Publish a folder made by `prune` or `push`, and the Space folder beside it if there is one.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.hub.publisher import Publisher

    config = config or PublishConfig()
    reporter = reporter or SilentReporter()
    publisher = Publisher(_reporting(hub, reporter))
    _remove_leftovers(folder)
    plan = publishplan.plan_publish(folder, config, hub, publisher)
    if plan.rewrites:  # the card names the repository it stands in
        if plan.record.measured_note:
            reporter.note(f"{plan.record.measured_note}.")
        _write_card(plan.record, folder, reporter)
    return _publish_both(plan.record, folder, plan.space_folder, plan, config, publisher)


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
    from gradmap_hub.exporters.formats import require

    record = RunRecord.read(folder)
    config = read_config(folder / "config.json")
    for name in formats:
        require(name, config)
    reporter = reporter or SilentReporter()
    checked = [name for name in formats if name in QUANTIZED]
    rows = _export_rows(folder, text, _reporting(hub or _default_hub(), reporter)) if checked else None
    stages = _stages_of(folder, reporter, "export")
    if "onnx" in formats:
        record = _export_onnx(folder, record, stages)
    if rows is not None:
        record = export_checked(folder, record, stages, checked, rows, keep_failing=keep_failing)
    return _write_card(record, folder, reporter)


def evaluate_folder(
    folder: Path, config: EvaluateConfig | None = None, *, reporter: Reporter | None = None, hub: Hub | None = None
) -> RunRecord:
    """Measure a pruned folder and its original on the same text, tasks and machine; record and card are written anew
    with the results once all of them are there.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.pipeline.evaluate import evaluate_stages

    reporter = reporter or SilentReporter()
    folder = folder if folder.name else folder.resolve()  # "." has no place beside it
    hub = _reporting(hub or _default_hub(), reporter)
    record = evaluate_stages(folder, config or EvaluateConfig(), reporter=reporter, hub=hub)
    return _write_card(record, folder, reporter)


def _export_rows(folder: Path, source: str, hub: Hub) -> Rows:
    from transformers import AutoTokenizer

    from gradmap_hub.data.rows import evaluation_rows

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = read_config(folder / "config.json").get("max_position_embeddings")
    tokens = min(EXPORT_TOKENS, longest) if isinstance(longest, int) else EXPORT_TOKENS
    return evaluation_rows(text_of(source, hub), tokenizer, seq_len=tokens, rows=EXPORT_ROWS)


def build_space(
    folder: Path,
    against: str | None = None,
    *,
    local: bool = False,
    text: str = DEFAULT_CALIBRATION,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> Path:
    """Write the comparison app for a pruned folder, exporting what it still lacks; returns the app's folder.

    By default it is the Space as it may be published, beside the folder. With `local` it is for this machine only and
    may hold an export of any original, also one that must not be passed on; it then lies where nothing publishes from,
    unless the Space as published has all of it.
    `text`: what the perplexity of the original's quantised files is measured on, where the folder has such files; if it
    cannot be read, the app does without them.

    Raises:
        GradmapError: there is no original, it cannot be read or exported, or both are too large for a Space.
    """
    reporter = reporter or SilentReporter()
    record = without_stale(RunRecord.read(folder), folder)
    model = against or record.base.repo_id
    if model is None:
        raise SourceError(
            f"{folder} was made from a local model, {record.base.name}.", hint="Say where it is with --against."
        )
    names = tuple(name for name in GRAPHS if name in precisions_of(record))
    if local and against is None and names and (written := finished_space(folder, record, names)) is not None:
        return written
    hub = _reporting(hub or _default_hub(), reporter)
    source = find_source(model, record.base.commit if against is None else None, hub)
    if not (folder / "onnx" / "model.onnx").is_file():
        record = export_folder(folder, ["onnx"], reporter=reporter)
        names = tuple(name for name in GRAPHS if name in precisions_of(record))
    run = Run(source, PruneConfig(layers=1), 1, folder, record.command, reporter, hub, stages="space")
    plan = (
        SpacePlan("space", "for this machine only", names, names)
        if local
        else plan_of(record, terms_of(record, source))
    )
    if not plan.precisions:
        raise SpaceImpossible(f"{plan.reason}.")
    rows = None
    if any(name in plan.stored for name in QUANTIZED):
        try:
            rows = _export_rows(folder, text, hub)
        except GradmapError as error:
            reporter.note(f"Without quantised files of the original, as the text cannot be read: {error.message}")
    destination = work_folder(folder) / "compare" if local else space_folder_of(folder)
    came = write_space_folder(run, record, plan, destination, record.target, rows)
    if not came.precisions:
        raise SpaceImpossible(f"{came.reason}.", hint="Name a text file with --text.")
    return destination


@contextmanager
def _no_empty_folders(output: Path) -> Iterator[None]:
    """A run that fails before it has anything to keep leaves no folder behind."""
    created = [folder for folder in (work_folder(output), output, *output.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()  # takes none but an empty one
        raise


def _remove_onnx(folder: Path) -> None:
    for name in ("onnx", "onnx.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _export_onnx(folder: Path, record: RunRecord, stages: Stages) -> RunRecord:
    from gradmap_hub.exporters import onnx

    destination = folder / "onnx"
    parity = onnx_stage(stages, "onnx", "Exporting to ONNX, comparing with PyTorch", folder, destination)
    artifacts = [entry for entry in record.artifacts if entry.format != "onnx"]
    for path in onnx.file_names(destination):
        if path.suffix != ".json":
            artifacts.append(artifact(path, folder, "onnx", parity if path.name == onnx.MODEL else None))
    timings = record.timings | stages.timings
    return dataclasses.replace(record, artifacts=artifacts, timings=timings)


def _write_card(record: RunRecord, folder: Path, reporter: Reporter | None = None) -> RunRecord:
    """Record, card and the numbers of a Space beside the folder, without measurements of other files than it holds."""
    from gradmap_hub.card.card import write_card
    from gradmap_hub.space.app import refresh_compare

    current = without_stale(record, folder)
    if current != record and reporter is not None:
        reporter.note(f"{current.measured_note}.")
    current.write(folder)
    write_card(current, folder)
    refresh_compare(current, space_folder_of(folder))
    return current


def _publish_both(
    record: RunRecord,
    folder: Path,
    space_folder: Path | None,
    targets: Targets,
    config: PublishConfig,
    publisher: Publisher,
) -> PushResult:
    """The model first; a refused Space never takes it back. Visibility changes last."""
    from gradmap_hub.hub.publisher import SpaceRefused
    from gradmap_hub.hub.space_watch import watch_space

    # Both are looked through before either is uploaded.
    _remove_leftovers(folder)
    if space_folder is not None:
        _remove_leftovers(space_folder)
    model_files = look_through(folder, "model", record, targets, publisher)
    if space_folder is not None and targets.space is not None:
        look_through(space_folder, "space", record, targets, publisher)
    message = f"Pruned {record.layers_before} -> {record.layers_after} layers with gradmap-hub {record.gradmap_hub}"
    if targets.create_pr:
        proposed = _publish(lambda: publisher.propose(model_files, targets.target, message=message), model_files,
                            publisher)  # fmt: skip
        return PushResult(record, folder, space_folder, proposed, None, "a pull request carries the model alone")
    terms = targets.terms(record.base.name, "model")
    model = _publish(lambda: publisher.publish(model_files, targets.target, terms, message=message), model_files,
                     publisher)  # fmt: skip
    result = PushResult(record, folder, space_folder, model, None, targets.space_reason or "not asked for")
    try:
        if space_folder is not None and targets.space is not None:
            try:
                space = _publish_space(space_folder, record, targets, model, publisher)
                result = dataclasses.replace(result, space=space, space_reason="")
            except SpaceRefused as refused:
                reason = f"{refused.message} {refused.hint or ''}".strip()
                result = dataclasses.replace(result, space_reason=reason)
        if config.collection is not None:
            result = _collect(result, config.collection, publisher.hub)
        if result.space is not None and config.wait_space:
            state = watch_space(publisher.hub, result.space.repo_id, result.space.commit, config.wait_space)
            result = dataclasses.replace(result, space_state=state)
        if targets.public:
            publisher.make_public(targets.target, "model")
            if result.space is not None and not (result.space_state and result.space_state.failed):
                publisher.make_public(targets.space_target, "space")
            elif result.space is not None:
                publisher.hub.reporter.note(f"{targets.space_target} stays private, as it does not run.")
    except HubError as error:
        # The model is safe; whoever reads only the last lines must learn it.
        error.hint = f"The model is published and verified: {model.url} at {model.commit}. {error.hint or ''}".strip()
        raise
    return result


def _collect(result: PushResult, collection: str, hub: Hub) -> PushResult:
    """Add what was published to the collection; a failure is told and undoes nothing."""
    from gradmap_hub.hub.collections import add_to_collection

    published: list[tuple[str, Literal["model", "space"]]] = [(result.model.repo_id, "model")]
    if result.space is not None:
        published.append((result.space.repo_id, "space"))
    hub.reporter.start("Adding to the collection")
    try:
        collected = add_to_collection(hub, collection, hub.account(), published)
    except HubError as error:
        hub.reporter.finish("not done")
        hub.reporter.note(f"The collection: {error.message} What is published stands; add it by hand, or run again.")
        return dataclasses.replace(result, collection_reason=error.message)
    hub.reporter.finish(collected.url)
    return dataclasses.replace(result, collection=collected)


def _publish_space(
    folder: Path, record: RunRecord, targets: Targets, model: Published, publisher: Publisher
) -> Published:
    """The Space on the hardware that it has; a new one on a CPU, or where that needs a paid plan, on ZeroGPU.

    Raises:
        SpaceRefused: the account may have neither.
        GradmapError: see `Publisher.publish`.
    """
    from gradmap_hub.hub.publisher import SpaceNeedsPlan, SpaceRefused
    from gradmap_hub.space.zerogpu import ZERO_GPU, is_zero, set_hardware

    there = publisher.hub.state(targets.space_target, "space")
    if there is not None:
        return _publish_space_on(folder, record, targets, model, publisher, zero=is_zero(there.hardware))
    try:
        return _publish_space_on(folder, record, targets, model, publisher, zero=False)
    except SpaceNeedsPlan as on_cpu:
        publisher.hub.reporter.note(f"{on_cpu.message} Trying {ZERO_GPU}, of which a free account may have two.")
        try:
            return _publish_space_on(folder, record, targets, model, publisher, zero=True)
        except SpaceRefused as on_zero:
            set_hardware(folder, zero=False)
            if not isinstance(on_zero, SpaceNeedsPlan):
                raise
            raise SpaceRefused(
                f"The Hub does not let this account create the Space {targets.space_target}: neither on a CPU nor on "
                "ZeroGPU (status 402).",
                hint=on_cpu.hint,
            ) from on_zero


def _publish_space_on(
    folder: Path, record: RunRecord, targets: Targets, model: Published, publisher: Publisher, *, zero: bool
) -> Published:
    from gradmap_hub.space.app import variables
    from gradmap_hub.space.zerogpu import ZERO_GPU, set_hardware

    assert targets.space is not None
    set_hardware(folder, zero=zero)
    files = look_through(folder, "space", record, targets, publisher)
    terms = targets.terms(record.base.name, "space")
    wanted = variables(record, targets.target, model.commit, targets.space)

    def publish() -> Published:
        return publisher.publish(
            files,
            targets.space_target,
            terms,
            message="Comparison app, written by gradmap-hub",
            variables=wanted,
            hardware=ZERO_GPU if zero else None,
        )

    return _publish(publish, files, publisher)


def _publish(publish: Callable[[], Published], files: Checked, publisher: Publisher) -> Published:
    published = publish()
    reporter = publisher.hub.reporter
    reporter.start(f"Verifying the published {'model' if files.kind == 'model' else 'Space'}")
    checked = publisher.verify(published, files)
    reporter.finish(f"{size(checked)} downloaded into a fresh cache, sha256 equal")
    return published


def _remove_leftovers(folder: Path) -> None:
    """What an export left that was killed."""
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _stages_of(folder: Path, reporter: Reporter, what: str) -> Stages:
    if not folder.is_dir():
        raise OutputExists(f"{folder} is not a folder.")
    return Stages(work_folder(folder), reporter, {"version": __version__, "what": what})


def _reporting(hub: Hub, reporter: Reporter | None) -> Hub:
    """The Hub, telling this reporter when it asks us to wait."""
    hub.reporter = reporter or SilentReporter()
    return hub


def _default_hub() -> Hub:
    from gradmap_hub.hub.client import Hub

    return Hub()
