"""`publish`: uploads finished folders, first the model, then the Space; then collection and visibility.

Nothing is computed again. The published files are downloaded and compared.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import HubError
from gradmap_hub.pipeline.checks import Targets
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.plan import look_through, plan_publish
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.collections import CollectionLink
    from gradmap_hub.hub.publisher import Published, Publisher, ScreenedFolder
    from gradmap_hub.hub.space_watch import SpaceState


def publish_folder(
    folder: Path, config: PublishConfig | None = None, *, hub: Hub | None = None, reporter: Reporter | None = None
) -> PushResult:
    """Publish a folder made by `prune` or `push`, and the Space folder next to it, if it exists.

    Args:
        folder: The model folder.
        config: Where and how to publish; by default private, in the user's own account.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.hub.publisher import Publisher

    config = config or PublishConfig()
    hub, reporter = connect(hub, reporter)
    remove_leftovers(folder)
    plan = plan_publish(folder, config, hub)
    if plan.rewrites:  # the card contains the name of its repository
        if plan.record.measured_note:
            reporter.note(f"{plan.record.measured_note}.")
        write_results(plan.record, folder, reporter)
    return publish_both(plan.record, folder, plan.space_folder, plan.targets, config, Publisher(hub, reporter))


@dataclass(frozen=True)
class PushResult:
    """The result of a push or publish.

    `space` is None if no Space was published; `space_reason` then says why. `space_state` is None if its start was not
    awaited. `collection` is None if none was requested or `collection_reason` says why it failed.
    """

    record: RunRecord
    folder: Path
    space_folder: Path | None
    model: Published
    space: Published | None
    space_reason: str
    space_state: SpaceState | None = None
    collection: CollectionLink | None = None
    collection_reason: str = ""


def publish_both(
    record: RunRecord,
    folder: Path,
    space_folder: Path | None,
    targets: Targets,
    config: PublishConfig,
    publisher: Publisher,
) -> PushResult:
    """Publish the model, then the Space; a rejected Space does not affect the model. Visibility changes last.

    Args:
        folder: The model folder; `record` describes it.
        space_folder: The folder of the Space, or None.
        targets: The repositories.

    Raises:
        GradmapError: see `look_through`, `Publisher.publish`, `Publisher.propose` and `Publisher.verify`.
    """
    from gradmap_hub.hub.publisher import SpaceRefused
    from gradmap_hub.hub.space_watch import watch_space

    # Both are checked before either is uploaded.
    remove_leftovers(folder)
    if space_folder is not None:
        remove_leftovers(space_folder)
    model_files = look_through(folder, "model", record, targets, publisher)
    if space_folder is not None and targets.space is not None:
        look_through(space_folder, "space", record, targets, publisher)
    message = f"Pruned {record.layers_before} -> {record.layers_after} layers with gradmap-hub {record.gradmap_hub}"
    if targets.create_pr:
        proposed = _publish(lambda: publisher.propose(model_files, targets.target, message=message), model_files,
                            publisher)  # fmt: skip
        return PushResult(record, folder, space_folder, proposed, None, "a pull request contains the model only")
    terms = targets.terms(record.base.name, "model")
    model = _publish(lambda: publisher.publish(model_files, targets.target, terms, message=message), model_files,
                     publisher)  # fmt: skip
    result = PushResult(record, folder, space_folder, model, None, targets.space_reason or "not requested")
    try:
        if space_folder is not None and targets.space is not None:
            try:
                space = _publish_space(space_folder, record, targets, model, publisher)
                result = dataclasses.replace(result, space=space, space_reason="")
            except SpaceRefused as refused:
                reason = f"{refused.message} {refused.hint or ''}".strip()
                result = dataclasses.replace(result, space_reason=reason)
        if config.collection is not None:
            result = _collect(result, config.collection, publisher)
        if result.space is not None and config.wait_space:
            state = watch_space(publisher.hub, result.space.repo_id, result.space.commit, config.wait_space,
                                publisher.reporter)  # fmt: skip
            result = dataclasses.replace(result, space_state=state)
        if targets.public:
            publisher.make_public(targets.target, "model")
            if result.space is not None and not (result.space_state and result.space_state.failed):
                publisher.make_public(targets.space_target, "space")
            elif result.space is not None:
                publisher.reporter.note(f"{targets.space_target} stays private, because it does not run.")
    except HubError as error:
        # The model is published; say so in the last lines of the output.
        error.hint = f"The model is published and verified: {model.url} at {model.commit}. {error.hint or ''}".strip()
        raise
    return result


def _collect(result: PushResult, collection: str, publisher: Publisher) -> PushResult:
    """Add the published repositories to the collection; a failure is reported and undoes nothing."""
    from gradmap_hub.hub.collections import add_to_collection

    published: list[tuple[str, Literal["model", "space"]]] = [(result.model.repo_id, "model")]
    if result.space is not None:
        published.append((result.space.repo_id, "space"))
    hub, reporter = publisher.hub, publisher.reporter
    reporter.start("Adding to the collection")
    try:
        collected = add_to_collection(hub, collection, hub.account(), published)
    except HubError as error:
        reporter.finish("failed")
        reporter.note(
            f"The collection: {error.message} The repositories are published; add them by hand, or run again."
        )
        return dataclasses.replace(result, collection_reason=error.message)
    reporter.finish(collected.url)
    return dataclasses.replace(result, collection=collected)


def _publish_space(
    folder: Path, record: RunRecord, targets: Targets, model: Published, publisher: Publisher
) -> Published:
    """Publish the Space on its current hardware; a new one on a CPU, or on ZeroGPU if a CPU needs a paid plan.

    Raises:
        SpaceRefused: the account may use neither.
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
        publisher.reporter.note(f"{on_cpu.message} Trying {ZERO_GPU}; a free account may have two.")
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


def _publish(publish: Callable[[], Published], files: ScreenedFolder, publisher: Publisher) -> Published:
    published = publish()
    reporter = publisher.reporter
    reporter.start(f"Verifying the published {'model' if files.kind == 'model' else 'Space'}")
    checked = publisher.verify(published, files)
    reporter.finish(f"{size(checked)} downloaded into a fresh cache, sha256 equal")
    return published


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files of a killed export."""
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
