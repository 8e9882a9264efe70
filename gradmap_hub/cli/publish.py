"""`gradmap-hub publish`: upload a finished folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from gradmap_hub.cli.options import (
    Collection,
    CreatePr,
    DryRun,
    Folder,
    Json,
    License,
    LicenseLink,
    LicenseName,
    NoSpace,
    Public,
    Quiet,
    To,
    Update,
    WaitSpace,
    WithSpace,
    kind_of_space,
)
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import next_view, plan_view, published_view, push_json, visibility
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import PublishConfig

if TYPE_CHECKING:
    from gradmap_hub.pipeline.plan import PublishPlan


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub publish small --to me/small-gradmap")(publish)


def publish(
    folder: Folder,
    to: To = None,
    space: WithSpace = "auto",
    no_space: NoSpace = False,
    public: Public = False,
    update: Update = False,
    create_pr: CreatePr = False,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    collection: Collection = None,
    wait_space: WaitSpace = 300,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a finished folder and verify the upload. Nothing is recomputed; a second run uploads nothing new."""
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.plan import plan_publish
    from gradmap_hub.pipeline.publish import publish_folder

    config = PublishConfig(
        to=to, space=kind_of_space(space, no_space), public=public, update=update, create_pr=create_pr, license=license,
        license_name=license_name, license_link=license_link, collection=collection, wait_space=wait_space,
    )  # fmt: skip
    if dry_run:
        emit(_plan(plan_publish(folder, config, Hub())), as_json)
        return
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        result = publish_folder(folder, config, hub=Hub(), reporter=reporter)
    emit(Result(push_json(result), (*published_view(result), *next_view(result, quiet=quiet))), as_json)


def _plan(plan: PublishPlan) -> Result:
    targets = plan.targets
    base, space = plan.record.base, targets.space_target if plan.space_folder else None
    shown_as = visibility(create_pr=targets.create_pr, public=targets.public)
    answer: dict[str, Any] = {
        "folder": str(plan.folder),
        "model": base.name,
        "license": base.license,
        "gated": base.gated,
        "target": targets.target,
        "space": space,
        "space_kinds": list(targets.kinds.order),
        "visibility": shown_as,
        "rewrites_card": plan.rewrites,
        "upload_bytes": plan.upload_bytes,
        "checks": [asdict(check) for check in plan.checks],
    }
    facts = {
        "folder": f"{plan.folder}, made from {base.name}",
        "target": f"{targets.target} ({shown_as})",
        "space": space or targets.space_reason or "none",
        **({"kind": targets.kinds.reason} if targets.space else {}),
        "card": "rewritten for this target" if plan.rewrites else "unchanged",
    }
    return Result(answer, plan_view(facts, plan.checks, "Nothing was written or published."))
