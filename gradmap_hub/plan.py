"""Before any work: what MODEL is, whether everything a run needs is in place, and what it will do.

Only config.json and listings are read here; no weight is fetched, nothing is written.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.architectures import Architecture, architecture_of
from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import CalibrationError, DiskTooSmall, LicenseUnknown, OutputExists, SourceError, UsageError
from gradmap_hub.record import FILE_NAME, Base
from gradmap_hub.source import Files, check_weights, choose_files, folder_sizes, read_config

if TYPE_CHECKING:
    from gradmap_hub.hub import Hub
    from gradmap_hub.space import SpacePlan

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
    files = choose_files(remote.files)
    license_id = remote.card.get("license")
    base = Base(
        name=model,
        repo_id=model,
        revision=revision or "main",
        commit=remote.commit,
        license=str(license_id) if isinstance(license_id, str) else None,
        license_name=remote.card.get("license_name"),
        license_link=remote.card.get("license_link"),
        gated=remote.gated,
        private=remote.private,
        language=_languages(remote.card.get("language")),
        model_type=architecture.model_type,
        dtype=_dtype_of(config),
        has_onnx="onnx/model.onnx" in remote.files,
    )
    return Source(base, architecture, int(config["num_hidden_layers"]), files, files.weight_bytes, sizes=remote.files)


def _folder_source(path: Path) -> Source:
    config = read_config(path / "config.json")
    architecture = architecture_of(config)
    files = choose_files(folder_sizes(path))
    check_weights(path, files)
    base = Base(name=path.resolve().name, model_type=architecture.model_type, dtype=_dtype_of(config))
    return Source(base, architecture, int(config["num_hidden_layers"]), files, files.weight_bytes, folder=path)


def _gguf_source(path: Path) -> Source:
    from gradmap_hub.gguf_source import gguf_config, read_metadata

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
        int(config["num_hidden_layers"]),
        Files((), (), 0),
        path.stat().st_size * 8,
        gguf=path,
    )


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
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskTooSmall(str(place), needed, free)


def is_local_text(source: str) -> bool:
    """Whether a calibration or evaluation source means a file here rather than a data set on the Hub."""
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix in _TEXT_SUFFIXES


def check_texts(config: PruneConfig) -> None:
    """Raises CalibrationError: a text file is not there."""
    for source in (*config.calibration, *config.eval_text):
        if is_local_text(source) and not Path(source).expanduser().is_file():
            raise CalibrationError(
                f"No such text file: {source}", hint="Give a .txt or .jsonl file, or a Hub dataset as owner/name."
            )


@dataclass(frozen=True)
class Targets:
    """Where a push goes."""

    target: str
    space_target: str
    space: SpacePlan | None


@dataclass(frozen=True)
class PushPlan(Targets):
    """Everything known before any work: what --dry-run prints."""

    source: Source
    output: Path
    removals: int
    license: str
    disk_bytes: int
    public: bool


def make_plan(config: PushConfig, hub: Hub) -> PushPlan:
    """All checks that need no weights, cheapest first.

    Raises:
        GradmapError: the first thing that would make the push fail later.
    """
    from gradmap_hub.space import plan_space

    if config.trust_remote_code:
        raise UsageError("--trust-remote-code is not available yet: models that need their own code are refused.")
    output = config.output or default_output(config.model, config.prune)
    check_output(output, config.resume)
    check_texts(config.prune)
    account = hub.account()
    source = find_source(config.model, config.revision, hub)
    removals = config.prune.removals(source.layer_count)
    license_id = source.base.license or config.license
    if license_id is None:
        raise LicenseUnknown(
            f"{source.base.name} states no licence, so nothing can be published from it.",
            hint="If you know its licence, state it with --license (an id such as apache-2.0, or other).",
        )
    if source.base.license is None or source.base.repo_id is None:
        hub.check_license(license_id)
    if config.public and source.base.gated:
        raise UsageError(f"{source.base.name} is gated: what is made from it stays private. Leave out --public.")
    if config.onnx:
        from gradmap_hub.exporters.onnx import require

        require()
    target = config.to or f"{account.name}/{output.resolve().name}"
    space_target = f"{target}-compare"
    hub.check_target(target, account, resuming=config.resume)
    space = None
    if config.space:
        hub.check_target(space_target, account, "space", resuming=config.resume)
        space = plan_space(
            license=license_id,
            gated=source.base.gated,
            private=source.base.private,
            has_onnx=source.base.has_onnx,
            has_repository=source.base.repo_id is not None,
            onnx=config.onnx,
        )
    # Checkpoint and its ONNX, each about the original's size in float32; the original's own ONNX for the Space; and
    # once more what is published, for the fresh copy it is verified against.
    float32 = source.weight_bytes * (2 if source.base.dtype in ("bfloat16", "float16") else 1)
    stored_original = float32 if space is not None and space.original == "space" and config.onnx else 0
    built = source.weight_bytes + (float32 if config.onnx else 0)
    disk = source.weight_bytes + 2 * built + stored_original
    check_disk(output, disk)
    return PushPlan(target, space_target, space, source, output, removals, license_id, disk, config.public)


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


def _languages(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(entry) for entry in value or []]
