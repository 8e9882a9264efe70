"""Before any work: what MODEL is, whether everything a run needs is in place, and what it will do.

Only config.json and listings are read here; no weight is fetched, nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.config import PublishConfig, PushConfig
from gradmap_hub.data.texts import check_texts
from gradmap_hub.errors import LicenseUnknown, UsageError
from gradmap_hub.formats import GRAPHS
from gradmap_hub.hub.target import Terms, model_mark, space_mark
from gradmap_hub.layout import (
    check_disk,
    check_output,
    default_output,
    disk_words,
)
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.architectures import compensation_skipped
from gradmap_hub.models.source import (
    Source,
    check_family,
    find_source,
)
from gradmap_hub.record import (
    SCHEMA_VERSION,
    Base,
    CalibrationRecord,
    CompensationRecord,
    LayerDecision,
    RunRecord,
)
from gradmap_hub.space.plan import SpacePlan, plan_space

if TYPE_CHECKING:
    from gradmap_hub.hub.accounts import Account
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.publisher import Publisher


@dataclass(frozen=True)
class Targets:
    """Where a push goes, and what the user allows there. `space`: None if there is to be none."""

    target: str
    space_target: str
    space: SpacePlan | None
    public: bool = False
    update: bool = False
    create_pr: bool = False
    # Why there is no Space, where one was asked for.
    space_reason: str = ""

    def terms(self, base_name: str, repo_type: str) -> Terms:
        mark = (model_mark if repo_type == "model" else space_mark)(base_name, self.target)
        return Terms(self.public, self.update, mark)


# At most so much of the float32 weights, in bytes (docs/onnx.md).
_QUANTIZED_SHARE = {"int8": 0.4, "int4": 0.4, "genai": 1.05, "fp16": 0.55}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before any work, and what was found."""

    name: str
    result: str


@dataclass(frozen=True, kw_only=True)
class PushPlan(Targets):
    """Everything known before any work: what --dry-run prints. `source.base` has the licence as it will be stated."""

    source: Source
    output: Path
    removals: int
    license: str
    disk_bytes: int
    upload_bytes: int
    checks: tuple[Check, ...]


def make_plan(config: PushConfig, hub: Hub, publisher: Publisher) -> PushPlan:
    """All checks that need no weights, cheapest first.

    Raises:
        GradmapError: the first thing that would make the push fail later.
    """
    if config.trust_remote_code:
        raise UsageError("--trust-remote-code is not available yet: models that need their own code are refused.")
    check_pull_request(config)
    output = config.output or default_output(config.model, config.prune)
    check_output(output, config.resume)
    check_texts(config.prune)
    account = hub.account()
    source = find_source(config.model, config.revision, hub)
    check_family(source, config.prune)
    removals = config.prune.removals(source.layer_count)
    base = state_license(source.base, config.license, config.license_name, config.license_link, hub)
    source = replace(source, base=base)
    if config.public and base.gated:
        raise UsageError(f"{base.name} is gated: what is made from it stays private. Leave out --public.")
    if config.onnx:
        from gradmap_hub.exporters.formats import require

        for name in ("onnx", *config.quantize):
            require(name, source.config)
    target = config.to or f"{account.name}/{output.resolve().name}"
    # Checkpoint and its ONNX, each about the original's size in float32.
    float32 = source.weight_bytes * (2 if base.dtype in ("bfloat16", "float16") else 1)
    space = _planned_space(config, source, removals, float32)
    reason = space.reason if space is not None and not space.precisions else ""
    targets = Targets(
        target,
        f"{target}-compare",
        None if reason else space,
        config.public,
        config.update,
        config.create_pr,
        reason,
    )
    found = check_targets(targets, base.name, account, publisher, resuming=(config.resume, config.resume))
    if config.collection is not None:
        from gradmap_hub.hub.collections import check_collection

        found.append(Check("collection", check_collection(hub, config.collection, account)))
    # Beside them the original's own ONNX for the Space; and once more what is published, for the fresh copy it is
    # verified against.
    stored = () if targets.space is None else targets.space.stored
    stored_original = round(float32 * sum(_QUANTIZED_SHARE.get(name, 1.0) for name in stored))
    quantized = round(float32 * sum(_QUANTIZED_SHARE[name] for name in config.quantize))
    built = source.weight_bytes + (float32 if config.onnx else 0) + quantized
    disk = source.weight_bytes + 2 * built + stored_original
    if config.quantize:
        disk += 2 * float32  # the graph they are made from, and the one of them that is being written
    check_disk(output, disk)
    upload = (float32 if config.prune.dtype == "float32" else source.weight_bytes) + built - source.weight_bytes
    upload += stored_original
    skipped = compensation_skipped(source.architecture, source.config)
    checks = (
        Check("account", f"{account.name}, token of role {account.role or 'unknown'}"),
        *found,
        Check("weights", _access(source)),
        Check("licence", license_words(base)),
        Check("card", _card_words(source, removals, targets)),
        *([] if skipped is None else [Check("correction", f"compensation skipped: {skipped}")]),
        Check("disk", disk_words(disk, output)),
        Check("upload", f"at most about {upload / 1e6:,.1f} MB"),
    )
    return PushPlan(
        target=target,
        space_target=targets.space_target,
        space=targets.space,
        public=config.public,
        update=config.update,
        create_pr=config.create_pr,
        space_reason=reason,
        source=source,
        output=output,
        removals=removals,
        license=base.license or "",
        disk_bytes=disk,
        upload_bytes=upload,
        checks=checks,
    )


def _planned_space(config: PushConfig, source: Source, removals: int, float32: int) -> SpacePlan | None:
    """The Space as far as it can be known before any work; None if none was asked for."""
    if not config.space or config.create_pr:
        return None
    wanted = ["float32", *(name for name in config.quantize if name in GRAPHS)] if config.onnx else []
    # What is not a layer stays whole, so the pruned model is at least this large.
    pruned = float32 * (source.layer_count - removals) // source.layer_count
    # A GGUF file's weights are counted at eight times its size, which is the most that they can be.
    least = float32 // 8 if source.gguf is not None else float32
    return plan_space(source.base, wanted, BeforeAfter(least, min(least, pruned)))


def check_pull_request(config: PublishConfig) -> None:
    """Raises UsageError: --create-pr together with what it excludes, or without saying to whom."""
    if not config.create_pr:
        return
    if config.to is None:
        raise UsageError("--create-pr needs --to OWNER/NAME: the repository that gets the pull request.")
    own = ((config.public, "--public"), (config.update, "--update"), (config.collection is not None, "--collection"))
    for given, option in own:
        if given:
            raise UsageError(f"--create-pr only proposes; leave out {option}, which is for a repository of your own.")


def check_targets(
    targets: Targets, base_name: str, account: Account, publisher: Publisher, *, resuming: tuple[bool, bool]
) -> list[Check]:
    """Refuse targets that cannot be ours, before any work. `resuming`: whether the model and the Space may be there
    already, because an earlier run of the same push put them there.

    Raises:
        GradmapError: see `Guard.check_target`.
    """
    model = publisher.guard.check_target(
        targets.target,
        account,
        "model",
        targets.terms(base_name, "model"),
        resuming=resuming[0],
        pull_request=targets.create_pr,
    )
    space = "none"
    if targets.space is not None:
        terms = targets.terms(base_name, "space")
        space = publisher.guard.check_target(targets.space_target, account, "space", terms, resuming=resuming[1])
    return [Check("target", model), Check("space", space)]


def state_license(
    base: Base, license_id: str | None, license_name: str | None, license_link: str | None, hub: Hub
) -> Base:
    """The base with the licence that will be stated: its own, or the one given for an original that states none.

    Raises:
        LicenseUnknown: there is neither.
        UsageError: both, and they differ; or an id that the Hub does not know.
    """
    from gradmap_hub.hub.card_check import is_known_license

    if base.license is None and license_id is None:
        raise LicenseUnknown(
            f"{base.name} states no licence, so nothing can be published from it.",
            hint="If you know its licence, state it with --license (an id such as apache-2.0, or other).",
        )
    if base.license_source == "publisher" and license_id is not None:  # stated before, and now anew
        base = replace(base, license=None, license_name=None, license_link=None)
    if base.license is not None and license_id not in (None, base.license):
        raise UsageError(
            f"{base.name} states its licence, {base.license}; --license is for originals that state none. Leave it out."
        )
    if base.license is None:
        base = replace(base, license=license_id, license_source="publisher")
    stated = base.license or ""
    if stated == "other":
        name, link = base.license_name or license_name, base.license_link or license_link
        base = replace(base, license_name=name, license_link=link)
    if not is_known_license(stated):
        hub.check_license(stated)  # the Hub may know more than the list here
    return base


def _access(source: Source) -> str:
    size = f"{source.weight_bytes / 1e6:,.1f} MB"
    if source.base.repo_id is None:
        return f"on this machine, {size}"
    kind = "gated, access granted" if source.base.gated else "private, readable" if source.base.private else "open"
    return f"{kind}, {size} at commit {(source.base.commit or '')[:12]}"


def license_words(base: Base) -> str:
    named = f" ({base.license_name}, {base.license_link})" if base.license == "other" else ""
    origin = "from the original" if base.license_source == "original" else "stated with --license"
    return f"{base.license}{named}, {origin}"


def _card_words(source: Source, removals: int, targets: Targets) -> str:
    """Build the header as it will be, without what is measured, and judge it.

    Raises:
        CardInvalid
    """
    import yaml

    from gradmap_hub.card.card import front_matter
    from gradmap_hub.hub.card_check import check_card

    layers = [LayerDecision(index, 0.0, index >= removals, "") for index in range(source.layer_count)]
    record = RunRecord(
        schema_version=SCHEMA_VERSION,
        gradmap_hub="",
        command="",
        name=targets.target.rpartition("/")[2],
        base=source.base,
        layers=layers,
        removed=list(range(removals)),
        ratio=removals / source.layer_count,
        parameters=BeforeAfter(0, 0),
        bytes=BeforeAfter(0, 0),
        metric="",
        schedule="",
        calibration=CalibrationRecord("", 0, 0, 0, ""),
        compensation=CompensationRecord(False),
        seed=0,
        target=targets.target,
    )
    header = front_matter(record)
    text = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"
    check_card(text, "model", accepted=(source.base.license or "",))
    return f"the header is valid: {', '.join(header)}"
