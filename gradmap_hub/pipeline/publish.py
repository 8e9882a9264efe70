"""Before a folder is published: whose it will be, what it may not hold, and what the card will say. Nothing is written.

`publish` goes on from here, and `publish --dry-run` stops here.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import DiskTooSmall, SourceError, UnsafeToPublish, UsageError
from gradmap_hub.evaluation.staleness import without_stale
from gradmap_hub.formats import GRAPHS
from gradmap_hub.hub.card_check import is_known_license
from gradmap_hub.layout import CARD, disk_words, free_bytes, space_folder_of
from gradmap_hub.pipeline.checks import Check, Targets, check_pull_request, check_targets, license_words, state_license
from gradmap_hub.record import Base, RunRecord
from gradmap_hub.space.plan import ORIGINAL_FOLDER, may_be_stored, plan_of

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.publisher import Checked, Publisher


@dataclass(frozen=True, kw_only=True)
class PublishPlan(Targets):
    """What will be published. `record`: as the folder will hold it, with licence and target; `rewrites`: whether that
    is not what it holds now. `space_folder`: None if no Space goes along."""

    folder: Path
    record: RunRecord
    rewrites: bool
    space_folder: Path | None
    upload_bytes: int
    checks: tuple[Check, ...]


def plan_publish(folder: Path, config: PublishConfig, hub: Hub, publisher: Publisher) -> PublishPlan:
    """All checks of a publish, cheapest first.

    Raises:
        GradmapError: the first thing that would make it fail.
    """
    from gradmap_hub.card.card import card_text

    check_pull_request(config)
    record = RunRecord.read(folder)
    _check_artifacts(record, folder)
    account = hub.account()
    base = state_license(record.base, config.license, config.license_name, config.license_link, hub)
    if config.public and base.gated:
        raise UsageError(f"{base.name} is gated: what is made from it stays private. Leave out --public.")
    target = config.to or record.target or f"{account.name}/{folder.resolve().name}"
    space_folder = space_folder_of(folder)
    plan, reason = None, ""
    if config.space and not config.create_pr and (space_folder / "app.py").is_file():
        plan = plan_of(dataclasses.replace(record, base=base))
        reason = "" if plan.precisions else plan.reason
        plan = plan if plan.precisions else None
    targets = Targets(target, f"{target}-compare", plan, config.public, config.update, config.create_pr, reason)
    # Only where this folder was published before may something lie already; `Publisher.publish` then compares it.
    resuming = (target == record.target, targets.space_target == record.space)
    found = check_targets(targets, base.name, account, publisher, resuming=resuming)
    if config.collection is not None:
        from gradmap_hub.hub.collections import check_collection

        found.append(Check("collection", check_collection(hub, config.collection, account)))
    elsewhere = target != record.target
    named = dataclasses.replace(
        without_stale(record, folder),
        base=base,
        target=target,
        space=targets.space_target if plan else None if elsewhere else record.space,
    )
    rewrites = named != record
    model = look_through(folder, "model", named, targets, publisher, card=card_text(named) if rewrites else None)
    size = model.size
    if plan is not None:
        check_space_folder(space_folder, base)
        size += look_through(space_folder, "space", named, targets, publisher).size
    place = Path(tempfile.gettempdir())  # where it is downloaded again and compared
    if free_bytes(place) < size:
        raise DiskTooSmall(str(place), size, free_bytes(place))
    weights = sum(entry.bytes for entry in record.artifacts if entry.format == "safetensors")
    checks = (
        Check("account", f"{account.name}, token of role {account.role or 'unknown'}"),
        *found,
        Check("weights", f"in {folder.name}, {weights / 1e6:,.1f} MB"),
        Check("licence", license_words(base)),
        Check("card", f"{CARD} is valid, with {model.card.results} results"),
        Check("files", f"{len(model.files)} in the model, none of them private to this machine"),
        Check("disk", disk_words(size, place)),
        Check("upload", f"at most about {size / 1e6:,.1f} MB"),
    )
    return PublishPlan(
        **{entry.name: getattr(targets, entry.name) for entry in dataclasses.fields(targets)},
        folder=folder,
        record=named,
        rewrites=rewrites,
        space_folder=space_folder if plan else None,
        upload_bytes=size,
        checks=checks,
    )


def look_through(
    folder: Path, kind: str, record: RunRecord, targets: Targets, publisher: Publisher, *, card: str | None = None
) -> Checked:
    """Every file of a folder, judged for what may not be published, and its card (or what it is going to be).

    Raises:
        UnsafeToPublish, CardInvalid
    """
    from gradmap_hub.hub.screening import this_machine

    known = (record.base.name, record.name, targets.target, targets.space_target)
    private = this_machine(publisher.hub.token, {"the folder it was made in": folder.resolve()}, known)
    license_id = record.base.license
    # An id that is not on our list was shown to the Hub before.
    accepted = (license_id,) if license_id and not is_known_license(license_id) else ()
    return publisher.check(folder, kind, private, accepted_licenses=accepted, card=card)


def check_space_folder(folder: Path, base: Base) -> None:
    """Raises UnsafeToPublish: an export of an original lies there that must not be passed on; it was made for this
    machine alone, or under other terms."""
    if may_be_stored(base):
        return
    for file in GRAPHS.values():
        if (folder / ORIGINAL_FOLDER / file).is_file():
            terms = "gated" if base.gated else "private" if base.private else f"under the licence {base.license}"
            raise UnsafeToPublish(
                f"{ORIGINAL_FOLDER}/{file}",
                f"is an export of {base.name}, which is {terms} and must not be passed on",
                hint="Write the Space anew with `gradmap-hub space FOLDER`, or leave it out with --no-space.",
            )


def _check_artifacts(record: RunRecord, folder: Path) -> None:
    """Raises SourceError: a file is not there, or not of the size that the record and the card tell of."""
    for entry in record.artifacts:
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise SourceError(
                f"{entry.path} in {folder} is not the file that its gradmap.json describes.",
                hint="Finish the run that makes it (with --resume), or make it again with `gradmap-hub export`.",
            )
