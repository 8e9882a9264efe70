"""The plans of `push` and `publish`, which `--dry-run` prints and the commands follow.

Planning reads config.json, file listings and finished files; it fetches no weights and writes nothing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.budget import teacher_bytes
from gradmap_hub.config import PublishConfig, PushConfig
from gradmap_hub.data.texts import check_texts
from gradmap_hub.errors import SourceError, UnsafeToPublish, UsageError
from gradmap_hub.evaluation.staleness import without_stale
from gradmap_hub.formats import FORMATS, ONNX, in_space, of_precision
from gradmap_hub.hub.card_check import is_known_license
from gradmap_hub.hub.screening import check_kind, screen_files, this_machine
from gradmap_hub.layout import CARD, check_output, default_output, space_folder_of
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.architectures import compensation_skipped
from gradmap_hub.models.source import Source, check_family, find_source
from gradmap_hub.pipeline.checks import Check, Checks, Targets, license_description
from gradmap_hub.pipeline.opening import check_opens
from gradmap_hub.pipeline.reproduce import check_expected
from gradmap_hub.pipeline.results import read_folder
from gradmap_hub.record import (
    SCHEMA_VERSION,
    Base,
    CalibrationRecord,
    CompensationRecord,
    LayerDecision,
    RunRecord,
)
from gradmap_hub.space.folder import is_space
from gradmap_hub.space.plan import ORIGINAL_FOLDER, SpacePlan, may_be_stored, plan_of, plan_space

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.publisher import Publisher, ScreenedFolder


@dataclass(frozen=True)
class PushPlan:
    """What is known before any work. `source.base` has the licence that the card states; `disk_bytes` and
    `upload_bytes` are upper bounds; `removals`: number of layers to remove."""

    targets: Targets
    source: Source
    output: Path
    removals: int
    license: str
    disk_bytes: int
    upload_bytes: int
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class PublishPlan:
    """What will be published. `record`: the record that the folder will have, with licence and target; `rewrites`:
    whether it differs from the current one. `space_folder`: None if no Space is published."""

    targets: Targets
    folder: Path
    record: RunRecord
    rewrites: bool
    space_folder: Path | None
    upload_bytes: int
    checks: tuple[Check, ...]


def make_plan(config: PushConfig, hub: Hub) -> PushPlan:
    """Run all checks of a push that need no weights, cheapest first.

    Raises:
        GradmapError: the first check that fails.
    """
    from gradmap_hub.hub.publisher import Publisher

    if config.trust_remote_code:
        raise UsageError(
            "--trust-remote-code is not supported: models that need Python code from their repository cannot be pruned."
        )
    output = config.output or default_output(config.model, config.prune)
    check_output(output, config.resume)
    check_texts(config.prune)
    checks = Checks(config, Publisher(hub))
    source = find_source(config.model, config.revision, hub)
    check_family(source, config.prune)
    for name in source.files.companions:
        check_kind(name, "model")
    if source.folder is not None:
        check_companions(source, source.folder, hub)
    removals = config.prune.removals(source.layer_count)
    base = checks.licensed(source.base)
    source = replace(source, base=base)
    if config.onnx:
        from gradmap_hub.exporters.export import require

        for name in (ONNX, *config.quantize):
            require(name, source.config)
    # Checkpoint and ONNX file each need about the size of the original in float32.
    float32 = source.weight_bytes * (2 if base.dtype in ("bfloat16", "float16") else 1)
    target = config.to or f"{checks.account.name}/{output.resolve().name}"
    targets = Targets.of(target, _planned_space(config, source, removals, float32), config, checks.account)
    checks.targets(targets, base.name, resuming=(config.resume, config.resume))
    if targets.space is not None:
        check_space_entries(space_folder_of(output))
    checks.add("weights", _access(source))
    checks.add("licence", license_description(base))
    checks.add("card", _card_summary(source, removals, targets))
    skipped = compensation_skipped(source.architecture, source.config)
    if skipped is not None:
        checks.add("compensation", f"skipped: {skipped}")
    predictions = _healing(config, source)
    if config.prune.budget is not None:
        text = ", ".join(config.prune.heal_text) or "the calibration text, and own text of a chat model"
        stored = f", {predictions / 1e6:,.1f} MB of the original's predictions" if predictions else ""
        checks.add("healing", f"{config.prune.heal} on {text}{stored}")
    disk, upload = _bytes_needed(config, source, targets, float32)
    disk += predictions
    checks.room(output, disk, upload)
    check_expected(source, config.repeats)
    return PushPlan(targets, source, output, removals, base.license or "", disk, upload, checks.found)


def _healing(config: PushConfig, source: Source) -> int:
    """Bytes of the original's predictions on disk; 0 if there is no healing or its tokens are not known yet."""
    budget = config.prune.budget
    if budget is None or budget.unit != "tokens":
        return 0
    return teacher_bytes(budget.amount, int(source.config.get("vocab_size") or 1 << 17))


def _bytes_needed(config: PushConfig, source: Source, targets: Targets, float32: int) -> tuple[int, int]:
    """Upper bounds of the bytes on disk and to upload. `float32`: bytes of the original's weights in float32."""
    # The ONNX file of the original for the Space, and everything twice: it is downloaded again for the verification.
    stored = () if targets.space is None else targets.space.stored
    stored_original = round(float32 * sum(of_precision(name).most_share for name in stored))
    quantized = round(float32 * sum(FORMATS[name].most_share for name in config.quantize))
    built = source.weight_bytes + (float32 if config.onnx else 0) + quantized
    disk = source.weight_bytes + 2 * built + stored_original
    if config.quantize:
        disk += 2 * float32  # the graph that they are made from, and a temporary file
    upload = (float32 if config.prune.dtype == "float32" else source.weight_bytes) + built - source.weight_bytes
    return disk, upload + stored_original


def _planned_space(config: PushConfig, source: Source, removals: int, float32: int) -> SpacePlan | None:
    """The preliminary plan of the Space; None if no Space is requested."""
    if config.space == "none" or config.create_pr:
        return None
    made = (ONNX, *config.quantize) if config.onnx else ()
    precisions = [row.precision for row in in_space() if row.name in made]
    # Only layers are removed, so the pruned model is at least this large.
    pruned = float32 * (source.layer_count - removals) // source.layer_count
    return plan_space(source.base, precisions, BeforeAfter(float32, pruned))


def _access(source: Source) -> str:
    size = f"{source.weight_bytes / 1e6:,.1f} MB"
    if source.base.repo_id is None:
        return f"local, {size}"
    kind = "gated, access granted" if source.base.gated else "private, readable" if source.base.private else "open"
    return f"{kind}, {size} at commit {(source.base.commit or '')[:12]}"


def _card_summary(source: Source, removals: int, targets: Targets) -> str:
    """Build the header that the card will have, without measurements, and check it; returns a description.

    Raises:
        CardInvalid: the header is not valid.
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


def plan_publish(folder: Path, config: PublishConfig, hub: Hub) -> PublishPlan:
    """Run all checks of a publish, cheapest first.

    Raises:
        GradmapError: the first check that fails.
    """
    from gradmap_hub.card.card import card_text
    from gradmap_hub.hub.publisher import Publisher

    record = read_folder(folder)
    _check_artifacts(record, folder)
    publisher = Publisher(hub)
    checks = Checks(config, publisher)
    base = checks.licensed(record.base)
    target = config.to or record.target or f"{checks.account.name}/{folder.resolve().name}"
    space_folder = space_folder_of(folder)
    with_space = config.space != "none" and not config.create_pr and is_space(space_folder)
    planned = plan_of(dataclasses.replace(record, base=base)) if with_space else None
    targets = Targets.of(target, planned, config, checks.account)
    # A target may exist only if this folder was published to it before; `Publisher.publish` compares the content.
    checks.targets(targets, base.name, resuming=(target == record.target, targets.space_target == record.space))
    moved = target != record.target
    named = dataclasses.replace(
        without_stale(record, folder),
        base=base,
        target=target,
        space=targets.space_target if targets.space else None if moved else record.space,
    )
    rewrites = named != record
    model = look_through(folder, "model", named, targets, publisher, card=card_text(named) if rewrites else None)
    upload = model.size
    if targets.space is not None:
        check_space_folder(space_folder, base)
        check_space_code(space_folder)
        upload += look_through(space_folder, "space", named, targets, publisher).size
    opened = [check_opens(place) for place in published_models(folder, space_folder if targets.space else None)]
    weights = sum(entry.bytes for entry in record.artifacts if entry.format == "safetensors")
    checks.add("weights", f"in {folder.name}, {weights / 1e6:,.1f} MB")
    checks.add("licence", license_description(base))
    checks.add("card", f"{CARD} is valid, with {model.card.results} results")
    checks.add("files", f"{len(model.files)} in the model, none with private data")
    checks.add("opens", f"with the runtime: {', '.join(opened)}")
    checks.room(Path(tempfile.gettempdir()), upload, upload)  # for the download that is compared
    found = space_folder if targets.space else None
    return PublishPlan(targets, folder, named, rewrites, found, upload, checks.found)


def published_models(folder: Path, space_folder: Path | None) -> list[Path]:
    """The model folders that are published: the model, and the original's export in the Space folder, if any."""
    stored = None if space_folder is None else space_folder / ORIGINAL_FOLDER
    return [folder, stored] if stored is not None and stored.is_dir() else [folder]


def look_through(
    folder: Path, kind: str, record: RunRecord, targets: Targets, publisher: Publisher, *, card: str | None = None
) -> ScreenedFolder:
    """Check that every file of a folder may be published and that its card is valid.

    Args:
        folder: The model folder or the Space folder.
        kind: "model" or "space".
        record: The record of the model.
        targets: The repositories; their names are not private.
        publisher: Knows the token, which no file may contain.
        card: The text of the README.md that will be written, if it is not on disk yet.

    Raises:
        UnsafeToPublish: a file is private, or of an unexpected type.
        CardInvalid: the header of README.md is not valid.
    """
    known = (record.base.name, record.name, targets.target, targets.space_target)
    private = this_machine(publisher.hub.token, {"the model folder": folder.resolve()}, known)
    license_id = record.base.license
    # The Hub has accepted an id outside our list before.
    accepted = (license_id,) if license_id and not is_known_license(license_id) else ()
    return publisher.check(folder, kind, private, accepted_licenses=accepted, card=card)


def check_companions(source: Source, folder: Path, hub: Hub) -> None:
    """Check the files that are copied from the original into the result, before any work.

    Args:
        source: The original.
        folder: The folder of its files.
        hub: Knows the token, which no file may contain.

    Raises:
        UnsafeToPublish: one contains something private, such as a token.
    """
    private = this_machine(hub.token, {}, (source.base.name,))
    screen_files({name: folder / name for name in source.files.companions}, "model", private)


def check_space_code(folder: Path) -> None:
    """Check that a Space folder has no code except the installed app, because it would run under the user's account.

    Raises:
        UnsafeToPublish: it has other code.
    """
    from gradmap_hub.space.integrity import foreign_code

    found = foreign_code(folder)
    if found is not None:
        raise UnsafeToPublish(
            f"{folder.name}/{found}",
            "is not part of the comparison app of this version of gradmap-hub",
            hint="Rewrite the Space folder with `gradmap-hub space FOLDER`, or leave it out with --no-space.",
        )


def check_space_entries(folder: Path) -> None:
    """Check that the folder into which the app is written has no other code.

    Raises:
        UnsafeToPublish: it has other code.
    """
    from gradmap_hub.space.integrity import foreign_entry

    found = foreign_entry(folder)
    if found is not None:
        raise UnsafeToPublish(
            f"{folder.name}/{found}", "is not part of the comparison app", hint="Remove it, or give another --output."
        )


def check_space_folder(folder: Path, base: Base) -> None:
    """Check that a Space folder has no export of an original that must not be redistributed, such as one made for
    local use or under earlier terms.

    Raises:
        UnsafeToPublish: it has such an export.
    """
    if may_be_stored(base):
        return
    for file in (row.file for row in in_space()):
        if (folder / ORIGINAL_FOLDER / file).is_file():
            terms = "gated" if base.gated else "private" if base.private else f"under the licence {base.license}"
            raise UnsafeToPublish(
                f"{ORIGINAL_FOLDER}/{file}",
                f"is an export of {base.name}, which is {terms} and must not be redistributed",
                hint="Rewrite the Space with `gradmap-hub space FOLDER`, or leave it out with --no-space.",
            )


def _check_artifacts(record: RunRecord, folder: Path) -> None:
    """Check that the recorded files exist with the recorded sizes.

    Raises:
        SourceError: a file is missing, or its size differs.
    """
    for entry in record.artifacts:
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise SourceError(
                f"{entry.path} in {folder} is not the file that gradmap.json describes.",
                hint="Finish the run with --resume, or export it again with `gradmap-hub export`.",
            )
