"""`publish`: uploads the model folder, then the Space folder; then updates the collection and the visibility.

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
from gradmap_hub.errors import BrowserRuntimeMissing, HubError
from gradmap_hub.pipeline.checks import Targets
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.plan import look_through, plan_publish
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.pipeline.space import browser_page
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord
from gradmap_hub.units import size

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.collections import CollectionLink
    from gradmap_hub.hub.publisher import Published, Publisher, ScreenedFolder
    from gradmap_hub.hub.space_watch import SpaceState
    from gradmap_hub.space.kinds import Kind


def publish_folder(
    folder: Path, config: PublishConfig | None = None, *, hub: Hub | None = None, reporter: Reporter | None = None
) -> PushResult:
    """Publish a folder made by `prune` or `push`, and the Space folder next to it, if it exists.

    Args:
        folder: The model folder.
        config: Where and how to publish; by default private, in the user's own account.

    Returns:
        The record, and the URLs and commits of model and Space.

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

    `space` is None if no Space was published; `space_reason` then says why, else `space_kind` says which kind it is.
    `space_state` is None if its start was not awaited. `collection` is None if none was requested or
    `collection_reason` says why it failed.
    """

    record: RunRecord
    folder: Path
    space_folder: Path | None
    model: Published
    space: Published | None
    space_reason: str
    space_state: SpaceState | None = None
    space_kind: str = ""
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
        config: The collection, and how long to wait for the Space.
        publisher: Writes to the Hub.

    Raises:
        GradmapError: see `look_through`, `Publisher.publish`, `Publisher.propose` and `Publisher.verify`.
    """
    from gradmap_hub.hub.publisher import SpaceRefused
    from gradmap_hub.hub.space_watch import watch_space
    from gradmap_hub.space.folder import kind_of

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
                space = _publish_space(space_folder, record, targets, model, folder, publisher)
                result = dataclasses.replace(result, space=space, space_reason="", space_kind=kind_of(space_folder))
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
            f"The collection was not updated: {error.message} The repositories are published; add them "
            "by hand, or run again."
        )
        return dataclasses.replace(result, collection_reason=error.message)
    reporter.finish(collected.url)
    return dataclasses.replace(result, collection=collected)


def _publish_space(
    folder: Path, record: RunRecord, targets: Targets, model: Published, model_folder: Path, publisher: Publisher
) -> Published:
    """Publish the Space. An existing one keeps its kind unless --space names another; a new one gets the first kind of
    the plan that the account may have.

    Raises:
        SpaceRefused: the account may have none of the kinds.
        GradmapError: see `Publisher.publish`.
    """
    from gradmap_hub.hub.publisher import SpaceNeedsPlan, SpaceRefused
    from gradmap_hub.space.folder import kind_of, set_kind
    from gradmap_hub.space.zerogpu import is_zero

    order, before = targets.kinds.order, kind_of(folder)
    there = publisher.hub.state(targets.space_target, "space")
    if there is not None and targets.wanted == "auto":
        order = ("browser" if there.sdk == "static" else "zero" if is_zero(there.hardware) else "gradio",)
    refused: SpaceRefused | None = None
    for kind, following in zip(order, [*order[1:], None], strict=True):
        try:
            return _publish_space_as(kind, folder, record, targets, model, model_folder, publisher)
        except SpaceNeedsPlan as error:
            refused = error
            if following is not None:
                publisher.reporter.note(f"{error.message} Trying {following}: {_WHY[following]}.")
        except BrowserRuntimeMissing as error:
            refused = SpaceRefused(error.message, hint=error.hint)
            if following is not None:
                publisher.reporter.note(f"{error.message} Trying {following}: {_WHY[following]}.")
    assert refused is not None
    if before != "browser":  # rewriting it for the browser would remove precisions
        set_kind(folder, before)
    if len(order) > 1 and isinstance(refused, SpaceNeedsPlan):
        raise SpaceRefused(
            f"The Hub does not let this account create the Space {targets.space_target} as any of: "
            f"{', '.join(order)} (status 402).",
            hint=refused.hint,
        ) from refused
    raise refused


# Why the next kind is tried after a refusal.
_WHY = {
    "gradio": "the app on a CPU",
    "browser": "a static Space, which is free for everybody",
    "zero": "the app on ZeroGPU, of which a free account may have two",
}


def _publish_space_as(
    kind: Kind,
    folder: Path,
    record: RunRecord,
    targets: Targets,
    model: Published,
    model_folder: Path,
    publisher: Publisher,
) -> Published:
    from gradmap_hub.hub.publisher import SpaceRefused
    from gradmap_hub.space.app import variables
    from gradmap_hub.space.browser import place_pruned
    from gradmap_hub.space.folder import set_kind
    from gradmap_hub.space.kinds import plan_browser
    from gradmap_hub.space.zerogpu import ZERO_GPU

    assert targets.space is not None
    page = browser_page(model_folder, record, publisher.hub.endpoint) if kind == "browser" else None
    if kind == "browser" and page is None:  # the existing Space is one, made for an earlier and smaller model
        raise SpaceRefused(
            f"The Space {targets.space_target} is a static Space (kind 'browser'), and "
            f"{plan_browser(targets.space).problem}.",
            hint="Delete that Space on the Hub and run the command again, or convert it with --space gradio, which "
            "needs a paid plan.",
        )
    set_kind(folder, kind, page, publisher.reporter)
    if kind == "browser":
        place_pruned(folder, model_folder, stored=not targets.public, commit=model.commit)
    files = look_through(folder, "space", record, targets, publisher)
    terms = targets.terms(record.base.name, "space")
    # A static Space has no process that could read them; its compare.json names the models.
    wanted = {} if kind == "browser" else variables(record, targets.target, model.commit, targets.space)

    def publish() -> Published:
        return publisher.publish(
            files,
            targets.space_target,
            terms,
            message="Comparison app, written by gradmap-hub",
            variables=wanted,
            hardware=ZERO_GPU if kind == "zero" else None,
            sdk="static" if kind == "browser" else "gradio",
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
    """Remove the partial folders that a killed export left."""
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
