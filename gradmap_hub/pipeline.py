"""The story, top to bottom: pull, calibrate, score, select, compensate, write, verify, measure (`run.prune_stages`),
then export, card, Space, publish. Each stage's result is on disk before the next begins, so a run can be resumed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import __version__
from gradmap_hub import plan as planning
from gradmap_hub.cardcheck import is_known_license
from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import HubError, OutputExists, SourceError, UsageError
from gradmap_hub.plan import (
    PushPlan,
    Targets,
    check_disk,
    check_output,
    check_pull_request,
    check_targets,
    check_texts,
    find_source,
    space_folder_of,
    state_license,
    work_folder,
)
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.record import Candidate, Parity, RunRecord
from gradmap_hub.run import Run, artifact, inspect_stages, prune_stages, size
from gradmap_hub.source import COMPANION_FILES, legal_texts
from gradmap_hub.stages import Stages

if TYPE_CHECKING:
    from gradmap_hub.hub import Hub
    from gradmap_hub.publishing import Checked, Published, Publisher
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
    hub = _reporting(hub or _default_hub(), reporter)
    check_output(output, resume)
    check_texts(config)
    source = find_source(model, revision, hub)
    removals = config.removals(source.layer_count)
    check_disk(output, source.weight_bytes * 2)
    with _no_empty_folders(output):
        run = Run(source, config, removals, output, command, reporter or SilentReporter(), hub)
        return _write_card(prune_stages(run), output)


def make_plan(config: PushConfig, hub: Hub) -> PushPlan:
    """Everything that can be known before any work: what --dry-run prints.

    Raises:
        GradmapError: the first thing that would make the push fail later.
    """
    from gradmap_hub.publishing import Publisher

    return planning.make_plan(config, hub, Publisher(hub))


def push(config: PushConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub) -> PushResult:
    """Prune, export, write card and Space, publish both, and verify what was published.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.publishing import Publisher

    reporter = reporter or SilentReporter()
    _reporting(hub, reporter)
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
    return _publish_both(record, plan.output, space_folder, plan, Publisher(hub), reporter)


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
    with tempfile.TemporaryDirectory(prefix="gradmap-inspect-") as scratch:
        run = Run(source, config, 1, Path(scratch) / "model", "", reporter or SilentReporter(), hub)
        return Inspection(*inspect_stages(run, ratios))


def publish_folder(
    folder: Path,
    *,
    to: str | None = None,
    space: bool = True,
    public: bool = False,
    update: bool = False,
    create_pr: bool = False,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    hub: Hub,
    reporter: Reporter | None = None,
) -> PushResult:
    """Publish a folder made by `prune` or `push`, and the Space folder beside it if there is one.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.publishing import Publisher

    check_pull_request(create_pr, to=to, public=public, update=update)
    reporter = reporter or SilentReporter()
    publisher = Publisher(_reporting(hub, reporter))
    record = RunRecord.read(folder)
    account = hub.account()
    base = state_license(record.base, license, license_name, license_link, hub)
    if public and base.gated:
        raise UsageError(f"{base.name} is gated: what is made from it stays private. Leave out --public.")
    target = to or record.target or f"{account.name}/{folder.resolve().name}"
    space_folder = space_folder_of(folder)
    plan = None
    if space and not create_pr and (space_folder / "app.py").is_file():
        plan = _space_plan(dataclasses.replace(record, base=base))
    targets = Targets(target, f"{target}-compare", plan, public, update, create_pr)
    # Only where this folder was published before may something lie already; `Publisher.publish` then compares it.
    resuming = (target == record.target, targets.space_target == record.space)
    check_targets(targets, base.name, account, publisher, resuming=resuming)
    elsewhere = target != record.target
    named = dataclasses.replace(
        record,
        base=base,
        target=target,
        space=targets.space_target if plan else None if elsewhere else record.space,
    )
    if named != record:  # the card names the repository it stands in
        record = _write_card(named, folder)
    built = space_folder if plan else None
    return _publish_both(record, folder, built, targets, publisher, reporter)


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
    hub = _reporting(hub or _default_hub(), reporter)
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
    publisher: Publisher,
    reporter: Reporter,
) -> PushResult:
    """The model first; a refused Space never takes it back. Visibility changes last."""
    from gradmap_hub.publishing import SpaceRefused
    from gradmap_hub.space import variables

    # Both are looked through before either is uploaded.
    model_files = _checked(folder, "model", record, targets, publisher)
    space_files = None
    if space_folder is not None and targets.space is not None:
        space_files = _checked(space_folder, "space", record, targets, publisher)
    message = f"Pruned {record.layers_before} -> {record.layers_after} layers with gradmap-hub {record.gradmap_hub}"
    if targets.create_pr:
        proposed = _publish(lambda: publisher.propose(model_files, targets.target, message=message), model_files,
                            publisher, reporter)  # fmt: skip
        return PushResult(record, folder, space_folder, proposed, None, "a pull request carries the model alone")
    terms = targets.terms(record.base.name, "model")
    model = _publish(lambda: publisher.publish(model_files, targets.target, terms, message=message), model_files,
                     publisher, reporter)  # fmt: skip
    space: Published | None = None
    reason = "not asked for"
    try:
        if space_files is not None and targets.space is not None:
            try:
                wanted = variables(record, targets.target, model.commit, targets.space)
                space = _publish_space(space_files, record, targets, wanted, publisher, reporter)
            except SpaceRefused as refused:
                reason = f"{refused.message} {refused.hint or ''}".strip()
        if targets.public:
            publisher.make_public(targets.target, "model")
            if space is not None:
                publisher.make_public(targets.space_target, "space")
    except HubError as error:
        # The model is safe; whoever reads only the last lines must learn it.
        error.hint = f"The model is published and verified: {model.url} at {model.commit}. {error.hint or ''}".strip()
        raise
    return PushResult(record, folder, space_folder, model, space, reason)


def _checked(folder: Path, kind: str, record: RunRecord, targets: Targets, publisher: Publisher) -> Checked:
    from gradmap_hub.screening import this_machine

    for leftover in folder.glob("*.partial"):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    known = (record.base.name, record.name, targets.target, targets.space_target)
    private = this_machine(publisher.hub.token, {"the folder it was made in": folder.resolve()}, known)
    license_id = record.base.license
    # An id that is not on our list was shown to the Hub before.
    accepted = (license_id,) if license_id and not is_known_license(license_id) else ()
    return publisher.check(folder, kind, private, accepted_licenses=accepted)


def _publish_space(
    files: Checked,
    record: RunRecord,
    targets: Targets,
    variables: dict[str, str],
    publisher: Publisher,
    reporter: Reporter,
) -> Published:
    terms = targets.terms(record.base.name, "space")
    message = "Comparison app, written by gradmap-hub"

    def publish() -> Published:
        return publisher.publish(files, targets.space_target, terms, message=message, variables=variables)

    return _publish(publish, files, publisher, reporter)


def _publish(publish: Callable[[], Published], files: Checked, publisher: Publisher, reporter: Reporter) -> Published:
    published = publish()
    reporter.start(f"Verifying the published {'model' if files.kind == 'model' else 'Space'}")
    checked = publisher.verify(published, files)
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


def _reporting(hub: Hub, reporter: Reporter | None) -> Hub:
    """The Hub, telling this reporter when it asks us to wait."""
    hub.reporter = reporter or SilentReporter()
    return hub


def _default_hub() -> Hub:
    from gradmap_hub.hub import Hub

    return Hub()
