"""The story, top to bottom: pull, calibrate, score, select, compensate, write, verify, measure (`run.prune_stages`),
then export, card, Space, publish. Each stage's result is on disk before the next begins, so a run can be resumed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import __version__
from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import LicenseUnknown, OutputExists, SourceError, UsageError
from gradmap_hub.plan import (
    Targets,
    check_disk,
    check_output,
    check_texts,
    find_source,
    make_plan,
    space_folder_of,
    work_folder,
)
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.record import Candidate, Parity, RunRecord
from gradmap_hub.run import Run, artifact, inspect_stages, prune_stages, size
from gradmap_hub.source import COMPANION_FILES, folder_sizes, legal_texts
from gradmap_hub.stages import Stages

if TYPE_CHECKING:
    from gradmap_hub.hub import Hub, Published
    from gradmap_hub.scoring import LayerScores
    from gradmap_hub.space import SpacePlan

__all__ = [
    "Inspection",
    "PushResult",
    "build_space",
    "export_folder",
    "inspect",
    "make_plan",
    "prune",
    "publish_folder",
    "push",
]

EXPORTS = ("onnx",)


@dataclass(frozen=True)
class PushResult:
    """What a push built and published. `space` is None if there is none, and `space_reason` says why."""

    record: RunRecord
    folder: Path
    space_folder: Path | None
    model: Published
    space: Published | None
    space_reason: str


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
) -> RunRecord:
    """Prune `model` into the folder `output`: checkpoint, tokenizer, card, gradmap.json.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub = hub or _default_hub()
    check_output(output, resume)
    check_texts(config)
    source = find_source(model, revision, hub)
    removals = config.removals(source.layer_count)
    check_disk(output, source.weight_bytes * 2)
    with _no_empty_folders(output):
        run = Run(source, config, removals, output, command, reporter or SilentReporter(), hub)
        return _write_card(prune_stages(run), output)


def push(config: PushConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub) -> PushResult:
    """Prune, export, write card and Space, publish both, and verify what was published.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    reporter = reporter or SilentReporter()
    plan = make_plan(config, hub)
    with _no_empty_folders(plan.output):
        run = Run(plan.source, config.prune, plan.removals, plan.output, command, reporter, hub)
        record = prune_stages(run, target=plan.target, license=plan.license)
    if config.onnx:
        record = _export_onnx(plan.output, record, run.stages)
    else:  # an earlier run's, perhaps of other layers: what is published is what this run was asked for
        _remove_onnx(plan.output)
    record = _write_card(dataclasses.replace(record, space=plan.space_target if plan.space else None), plan.output)
    space_folder = None
    if plan.space is not None:
        space_folder = space_folder_of(plan.output)
        _write_space(record, plan.space, space_folder, run.checkpoint(), run.stages, plan.target)
    return _publish_both(record, plan.output, space_folder, plan, hub, reporter, public=config.public)


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

    hub = hub or _default_hub()
    check_texts(config)
    source = find_source(model, revision, hub)
    with tempfile.TemporaryDirectory(prefix="gradmap-inspect-") as scratch:
        run = Run(source, config, 1, Path(scratch) / "model", "", reporter or SilentReporter(), hub)
        return Inspection(*inspect_stages(run, ratios))


def publish_folder(
    folder: Path,
    *,
    to: str | None = None,
    space: bool = True,
    public: bool = False,
    hub: Hub,
    reporter: Reporter | None = None,
) -> PushResult:
    """Publish a folder made by `prune` or `push`, and the Space folder beside it if there is one."""
    record = RunRecord.read(folder)
    account = hub.account()
    if record.base.license is None:
        raise LicenseUnknown(
            f"{record.base.name} states no licence, so nothing can be published from it.",
            hint="Make it again with `gradmap-hub push --license ID`, if you know its licence.",
        )
    if public and record.base.gated:
        raise UsageError(f"{record.base.name} is gated: what is made from it stays private. Leave out --public.")
    target = to or record.target or f"{account.name}/{folder.resolve().name}"
    # Only where this folder was published before may something lie already; `hub.publish` then compares it.
    hub.check_target(target, account, resuming=target == record.target)
    space_folder = space_folder_of(folder)
    plan = _space_plan(record) if space and (space_folder / "app.py").is_file() else None
    targets = Targets(target, f"{target}-compare", plan)
    if plan is not None:
        hub.check_target(targets.space_target, account, "space", resuming=targets.space_target == record.space)
    elsewhere = target != record.target
    named = dataclasses.replace(
        record, target=target, space=targets.space_target if plan else None if elsewhere else record.space
    )
    if named != record:  # the card names the repository it stands in
        record = _write_card(named, folder)
    built = space_folder if plan else None
    return _publish_both(record, folder, built, targets, hub, reporter or SilentReporter(), public=public)


def export_folder(folder: Path, formats: list[str], *, reporter: Reporter | None = None) -> RunRecord:
    """Export a pruned folder; its record and card are written anew with what was exported."""
    from gradmap_hub.exporters.onnx import require

    unknown = sorted(set(formats) - set(EXPORTS))
    if unknown:
        raise UsageError(f"Cannot export to {unknown[0]!r}; formats: {', '.join(EXPORTS)}.")
    record = RunRecord.read(folder)
    require()
    stages = _stages_of(folder, reporter or SilentReporter(), "export")
    return _write_card(_export_onnx(folder, record, stages), folder)


def build_space(
    folder: Path,
    against: str | None = None,
    *,
    local: bool = False,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> Path:
    """Write the comparison app for a pruned folder, exporting what it still lacks; returns the app's folder.

    By default it is the Space as it may be published, beside the folder. With `local` it is for this machine only and
    may hold an export of any original, also one that must not be passed on; it then lies where nothing publishes from.
    """
    from gradmap_hub.space import SpacePlan

    reporter = reporter or SilentReporter()
    record = RunRecord.read(folder)
    model = against or record.base.repo_id
    if model is None:
        raise SourceError(
            f"{folder} was made from a local model, {record.base.name}.", hint="Say where it is with --against."
        )
    hub = hub or _default_hub()
    source = find_source(model, record.base.commit if against is None else None, hub)
    if not (folder / "onnx" / "model.onnx").is_file():
        record = export_folder(folder, ["onnx"], reporter=reporter)
    run = Run(source, PruneConfig(layers=1), 1, folder, record.command, reporter, hub, stages="space")
    plan = SpacePlan("space", "for this machine only") if local else _space_plan(record)
    destination = work_folder(folder) / "compare" if local else space_folder_of(folder)
    original = run.checkpoint() if plan.original == "space" else folder
    return _write_space(record, plan, destination, original, run.stages, record.target)


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
    parity = _onnx_stage(stages, "onnx", "Exporting to ONNX, comparing with PyTorch", folder, destination)
    artifacts = [entry for entry in record.artifacts if entry.format != "onnx"]
    for path in onnx.file_names(destination):
        if path.suffix != ".json":
            artifacts.append(artifact(path, folder, "onnx", parity if path.name == onnx.MODEL else None))
    timings = record.timings | stages.timings
    return dataclasses.replace(record, artifacts=artifacts, timings=timings)


def _onnx_stage(stages: Stages, name: str, title: str, checkpoint: Path, destination: Path) -> Parity:
    from gradmap_hub.exporters import onnx

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


def _write_card(record: RunRecord, folder: Path) -> RunRecord:
    from gradmap_hub.card import write_card

    record.write(folder)
    write_card(record, folder)
    return record


def _write_space(
    record: RunRecord, plan: SpacePlan, destination: Path, original: Path, stages: Stages, target: str | None
) -> Path:
    from gradmap_hub.space import ORIGINAL_FOLDER, write_space

    companions: dict[str, Path] = {}
    if plan.original == "space":
        _onnx_stage(
            stages, "onnx-original", "Exporting the original for the Space", original, destination / ORIGINAL_FOLDER
        )
        present = [*COMPANION_FILES, *legal_texts(path.name for path in original.iterdir())]
        companions = {name: original / name for name in present if (original / name).is_file()}
    write_space(record, plan, destination, pruned_repo=target, companions=companions)
    return destination


def _publish_both(
    record: RunRecord,
    folder: Path,
    space_folder: Path | None,
    targets: Targets,
    hub: Hub,
    reporter: Reporter,
    *,
    public: bool,
) -> PushResult:
    """The model first; a refused Space never takes it back. Visibility changes last."""
    from gradmap_hub.hub import SpaceRefused
    from gradmap_hub.space import variables

    message = f"Pruned {record.layers_before} -> {record.layers_after} layers with gradmap-hub {record.gradmap_hub}"
    model = _publish(folder, targets.target, "model", message, hub, reporter)
    space: Published | None = None
    reason = "not asked for"
    if space_folder is not None and targets.space is not None:
        wanted = variables(record, targets.target, model.commit, targets.space)
        message = "Comparison app, written by gradmap-hub"
        try:
            space = _publish(space_folder, targets.space_target, "space", message, hub, reporter, wanted)
        except SpaceRefused as refused:
            reason = f"{refused.message} {refused.hint or ''}".strip()
    if public:
        hub.make_public(targets.target, "model")
        if space is not None:
            hub.make_public(targets.space_target, "space")
    return PushResult(record, folder, space_folder, model, space, reason)


def _publish(
    folder: Path,
    target: str,
    repo_type: str,
    message: str,
    hub: Hub,
    reporter: Reporter,
    variables: dict[str, str] | None = None,
) -> Published:
    what = "model" if repo_type == "model" else "Space"
    for leftover in folder.glob("*.partial"):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    reporter.start(f"Publishing the {what}")
    published = hub.publish(folder, target, repo_type=repo_type, message=message, variables=variables)
    amount = size(sum(folder_sizes(folder).values()))
    reporter.finish(f"{target}, {amount}, commit {published.commit[:12]}", reused=not published.uploaded)
    reporter.start(f"Verifying the published {what}")
    checked = hub.verify(published, folder, repo_type=repo_type)
    reporter.finish(f"{size(checked)} downloaded into a fresh cache, sha256 equal")
    return published


def _space_plan(record: RunRecord) -> SpacePlan:
    from gradmap_hub.space import plan_space

    return plan_space(
        license=record.base.license,
        gated=record.base.gated,
        private=record.base.private,
        has_onnx=record.base.has_onnx,
        has_repository=record.base.repo_id is not None,
        onnx=any(entry.format == "onnx" for entry in record.artifacts),
    )


def _stages_of(folder: Path, reporter: Reporter, what: str) -> Stages:
    if not folder.is_dir():
        raise OutputExists(f"{folder} is not a folder.")
    return Stages(work_folder(folder), reporter, {"version": __version__, "what": what})


def _default_hub() -> Hub:
    from gradmap_hub.hub import Hub

    return Hub()
