"""Before any work: what MODEL is, whether everything a run needs is in place, and what it will do.

Only config.json and listings are read here; no weight is fetched, nothing is written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.config import PruneConfig, PublishConfig, PushConfig
from gradmap_hub.errors import CalibrationError, DiskTooSmall, LicenseUnknown, OutputExists, SourceError, UsageError
from gradmap_hub.hub.target import Terms, model_mark, space_mark
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.architectures import Architecture, architecture_of, correction_skipped, dimension
from gradmap_hub.models.safetensors_files import (
    CARD,
    Files,
    check_weights,
    choose_files,
    folder_sizes,
    in_both_forms,
    read_config,
)
from gradmap_hub.models.transformers_compat import needs_5
from gradmap_hub.record import (
    FILE_NAME,
    SCHEMA_VERSION,
    Base,
    CalibrationRecord,
    CompensationRecord,
    LayerDecision,
    RunRecord,
)
from gradmap_hub.space.plan import GRAPHS, SpacePlan, plan_space

if TYPE_CHECKING:
    from gradmap_hub.hub.accounts import Account
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.hub.publisher import Publisher

_TEXT_SUFFIXES = (".txt", ".jsonl", ".utf8", ".raw", ".md")


@dataclass(frozen=True)
class Source:
    """A model source, judged from its config and listing; no weight has been read. Exactly one of `folder` (local),
    `gguf` (local file) and `base.commit` (Hub) says where the weights are."""

    base: Base
    architecture: Architecture
    layer_count: int
    files: Files
    weight_bytes: int
    parameters: int | None = None
    folder: Path | None = None
    gguf: Path | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def find_source(model: str, revision: str | None, hub: Hub) -> Source:
    """Resolve MODEL: an existing .gguf file, an existing folder, or a Hub id. Only config.json is read."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        return _folder_source(path)
    if path.exists():
        raise SourceError(
            f"{model} is neither a folder nor a .gguf file.", hint="Give a Hub id, a folder or a .gguf file."
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise SourceError(f"There is no folder {model}.", hint="Give a Hub id (org/model), a folder or a .gguf file.")
    remote = hub.model(model, revision)
    if "config.json" not in remote.files:
        raise SourceError(f"{model} has no config.json: it is not a transformers model.", hint="Give another model.")
    config = read_config(hub.fetch(model, remote.commit, ["config.json"]) / "config.json")
    architecture = architecture_of(config)
    only_5 = needs_5(config)
    config = in_both_forms(config)
    files = choose_files(remote.files)
    exports = own_exports(remote.files)
    base = Base(
        name=model,
        repo_id=model,
        revision=revision or "main",
        commit=remote.commit,
        gated=remote.gated,
        private=remote.private,
        **_card_facts(remote.card),
        model_type=architecture.model_type,
        dtype=_dtype_of(config),
        has_onnx="float32" in exports,
        exports=exports,
        needs_5=only_5,
    )
    return Source(
        base,
        architecture,
        _depth(config),
        files,
        files.weight_bytes,
        sizes=remote.files,
        config=config,
    )


def own_exports(files: Mapping[str, int]) -> list[str]:
    """The precisions of which a listing has ONNX files like ours. model.onnx is float32 wherever it comes from. What
    others call int8 often rounds activations too, which is not what the pruned model is compared in; so quantised files
    count only in a repository that this program made."""
    present = [name for name, file in GRAPHS.items() if f"onnx/{file}" in files]
    return [name for name in present if name == "float32" or FILE_NAME in files]


def _folder_source(path: Path) -> Source:
    from gradmap_hub.hub.card_check import header_of

    config = read_config(path / "config.json")
    architecture = architecture_of(config)
    only_5 = needs_5(config)
    config = in_both_forms(config)
    files = choose_files(folder_sizes(path))
    check_weights(path, files)
    base = Base(
        name=path.resolve().name,
        model_type=architecture.model_type,
        dtype=_dtype_of(config),
        **_card_facts(header_of(path / CARD) or {}),
        needs_5=only_5,
    )
    return Source(base, architecture, _depth(config), files, files.weight_bytes, folder=path, config=config)


def _gguf_source(path: Path) -> Source:
    from gradmap_hub.models.gguf import gguf_config, read_metadata

    metadata = read_metadata(path)
    config = gguf_config(path)
    architecture = architecture_of(config)
    languages = metadata.get("general.languages")
    base = Base(
        name=path.stem,
        license=metadata.get("general.license"),
        language=_languages(languages),
        model_type=architecture.model_type,
        dtype="float32",
    )
    # Dequantised to float32: at most 8 times the bytes of a 4-bit file.
    return Source(
        base,
        architecture,
        _depth(config),
        Files((), (), 0),
        path.stat().st_size * 8,
        gguf=path,
        config=config,
    )


def _depth(config: Mapping[str, Any]) -> int:
    depth = dimension(config, "num_hidden_layers")
    assert depth is not None  # architecture_of saw to it
    return depth


def check_family(source: Source, config: PruneConfig) -> None:
    """Raises UsageError: an option that is not for models of this type."""
    reason = source.architecture.unstreamed
    if config.low_memory and reason is not None:
        raise UsageError(f"--low-memory is not for models of type {source.architecture.model_type!r}: {reason}.")


def check_output(output: Path, resume: bool, mark: Path | None = None) -> None:
    """Raises OutputExists: the folder holds something, and it is not to be resumed or not a run of ours (which has
    the folder `mark`): going on in it would publish what somebody else put there."""
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file.", hint="Choose another --output.")
    if not output.exists() or not any(output.iterdir()):
        return
    ours = (mark or work_folder(output)).is_dir() or (output / FILE_NAME).is_file()
    if resume and ours:
        return
    raise OutputExists(
        f"The folder {output} is not empty; nothing in it was touched.",
        hint="Add --resume to go on with the run that made it, or choose another folder."
        if ours
        else "Choose another folder.",
    )


def check_disk(output: Path, needed: int) -> None:
    """Raises DiskTooSmall: less free space than `needed` bytes where `output` will be."""
    free = free_bytes(output)
    if free < needed:
        raise DiskTooSmall(str(_existing(output)), needed, free)


def free_bytes(path: Path) -> int:
    """The free space where a path is, or will be."""
    return shutil.disk_usage(_existing(path)).free


def disk_words(needed: int, path: Path) -> str:
    return f"about {needed / 1e9:.2f} GB needed, {free_bytes(path) / 1e9:.2f} GB free"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def is_local_text(source: str) -> bool:
    """Whether a calibration or evaluation source means a file here rather than a data set on the Hub."""
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix in _TEXT_SUFFIXES


def check_texts(config: PruneConfig) -> None:
    """Raises CalibrationError: a text file is not there."""
    check_text_files((*config.calibration, *config.eval_text))


def check_text_files(sources: Iterable[str]) -> None:
    """Raises CalibrationError: a text file is not there."""
    for source in sources:
        if is_local_text(source) and not Path(source).expanduser().is_file():
            raise CalibrationError(
                f"No such text file: {source}", hint="Give a .txt or .jsonl file, or a Hub dataset as owner/name."
            )


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
    skipped = correction_skipped(source.architecture, source.config)
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


def default_output(model: str, config: PruneConfig) -> Path:
    """NAME-gradmap-25 in the working folder."""
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    if config.ratio is not None:
        how_much = f"{math.floor(config.ratio * 100 + 0.5)}"
    else:
        how_much = f"{config.layers or len(config.drop or ())}layers"
    return Path(f"{name}-gradmap-{how_much}")


def work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def space_folder_of(output: Path) -> Path:
    """The Space folder beside a model folder."""
    return output.with_name(output.name + "-space")


def _dtype_of(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """What of a card's header goes into the record, checked for its type: anybody may have written it."""
    texts = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    facts: dict[str, Any] = {name: value if isinstance(value, str) else None for name, value in texts.items()}
    return facts | {"language": _languages(card.get("language"))}


def _languages(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(entry) for entry in value or []]
