"""Resolve MODEL: a Hub id, a folder or a .gguf file, by its config and file listing; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from gradmap_hub.config import PruneMethod
from gradmap_hub.errors import SourceError, UsageError
from gradmap_hub.formats import ONNX, graph_path, in_space
from gradmap_hub.layout import CARD, CONFIG, folder_sizes
from gradmap_hub.models.architectures import Architecture, dimension
from gradmap_hub.models.safetensors_files import (
    ADAPTER_CONFIG,
    Files,
    check_dtypes,
    check_json_size,
    check_weights,
    choose_files,
    in_both_forms,
    only_adapter,
    read_config,
)
from gradmap_hub.models.support import architecture_of
from gradmap_hub.models.transformers_compat import needs_5
from gradmap_hub.record import (
    FILE_NAME,
    Base,
)


class RemoteFiles(Protocol):
    """A model repository at one commit. `files`: {path: bytes}; `card`: the YAML header of its README."""

    @property
    def commit(self) -> str: ...
    @property
    def files(self) -> dict[str, int]: ...
    @property
    def card(self) -> dict[str, Any]: ...
    @property
    def gated(self) -> bool: ...
    @property
    def private(self) -> bool: ...


class ModelHub(Protocol):
    """The part of the Hub client that is used here; `gradmap_hub.hub.client.Hub` implements it."""

    def model(self, repo_id: str, revision: str | None) -> RemoteFiles: ...
    def fetch(self, repo_id: str, commit: str, names: Sequence[str]) -> Path: ...
    def tensor_dtypes(self, repo_id: str, commit: str, name: str) -> Mapping[str, str]: ...


# A language on a card, as the Hub accepts it: ISO 639, or one of its special values.
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
# Characters of a model card in which its header is looked for; the largest headers have a few thousand.
_MOST_HEADER = 200_000
# Weight files whose headers are read before any weights are fetched, one request each; the rest are checked later.
_MOST_HEADERS = 8
# The YAML header of a README.md, between two lines of dashes.
_HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A resolved model source. Exactly one of `folder` (local), `gguf` (local file) and `base.commit` (Hub) locates the
    weights, which have not been read. `sizes`: {path: bytes} on the Hub; `config`: the content of config.json."""

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


def find_source(model: str, revision: str | None, hub: ModelHub) -> Source:
    """Resolve MODEL: a .gguf file, an existing folder, or a Hub id. Of the weights only headers are read.

    Raises:
        SourceError: MODEL does not exist, is damaged, or is not a model that can be pruned.
        HubError: the Hub does not answer, or refuses access.
    """
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
    if CONFIG not in remote.files:
        if ADAPTER_CONFIG in remote.files:
            raise only_adapter(model)
        raise SourceError(
            f"{model} has no config.json: it is not a transformers model.",
            hint="Give the Hub id of a transformers model, or a .gguf file.",
        )

    def fetched(name: str) -> Path:
        return hub.fetch(model, remote.commit, [name]) / name

    check_json_size(CONFIG, remote.files[CONFIG])
    config = read_config(fetched(CONFIG))
    architecture = architecture_of(config)
    only_5 = needs_5(config)
    config = in_both_forms(config)
    files = choose_files(remote.files, fetched)
    for shard in [name for name in files.weights if name.endswith(".safetensors")][:_MOST_HEADERS]:
        check_dtypes(shard, hub.tensor_dtypes(model, remote.commit, shard))
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
    """The precisions in which a listing {path: bytes} has ONNX files comparable to ours. model.onnx is always float32.
    The int8 files of others often quantise activations too, so quantised files count only in repositories that
    gradmap-hub created."""
    present = [row for row in in_space() if graph_path(row) in files]
    return [row.precision for row in present if row.name == ONNX or FILE_NAME in files]


def _folder_source(path: Path) -> Source:
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).exists():
        raise only_adapter(str(path))
    config = read_config(path / CONFIG)
    architecture = architecture_of(config)
    only_5 = needs_5(config)
    config = in_both_forms(config)
    files = choose_files(folder_sizes(path), path.joinpath)
    for name in (CONFIG, *files.companions):
        _check_inside(path, name)
    check_weights(path, files)
    base = Base(
        name=path.resolve().name,
        model_type=architecture.model_type,
        dtype=_dtype_of(config),
        **_card_facts(_card_header(path / CARD)),
        needs_5=only_5,
    )
    return Source(base, architecture, _depth(config), files, files.weight_bytes, folder=path, config=config)


def _check_inside(folder: Path, name: str) -> None:
    """Raises SourceError: a file that is copied into the result is a link out of the folder. The folder may come from
    somebody else, and a link `LICENSE -> ~/.ssh/id_rsa` would be published. The Hub's cache links to its own blobs."""
    root, target = folder.resolve(), (folder / name).resolve()
    cached = target.parent.name == "blobs" and root.parent.name == "snapshots" and target.parents[1] == root.parents[1]
    if not target.is_relative_to(root) and not cached:
        raise SourceError(
            f"{name} in {folder} is a link to a file outside of the folder.",
            hint="Replace the link with the file itself, if it belongs to the model.",
        )


def _card_header(path: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if it is missing, invalid or too long."""
    try:
        if not path.is_file():  # missing, or a pipe
            return {}
        with path.open(encoding="utf-8") as stream:
            found = _HEADER.match(stream.read(_MOST_HEADER))
        header = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _gguf_source(path: Path) -> Source:
    from gradmap_hub.models.gguf import open_gguf

    model = open_gguf(path)
    config = in_both_forms(model.config)
    architecture = architecture_of(config)
    base = Base(
        name=path.stem,
        license=model.license,
        language=_languages(model.header.metadata.get("general.languages")),
        model_type=architecture.model_type,
        dtype="float32",
    )
    return Source(
        base,
        architecture,
        _depth(config),
        Files((), (), 0),
        model.weight_bytes,
        gguf=path,
        config=config,
    )


def _depth(config: Mapping[str, Any]) -> int:
    depth = dimension(config, "num_hidden_layers")
    assert depth is not None  # checked by architecture_of
    return depth


def check_family(source: Source, config: PruneMethod) -> None:
    """Check the options against the model type.

    Raises:
        UsageError: the type does not support an option.
    """
    reason = source.architecture.unstreamed
    if config.low_memory and reason is not None:
        raise UsageError(f"--low-memory does not support models of type {source.architecture.model_type!r}: {reason}.")


def _dtype_of(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a card's header for the record, without values of a wrong type: the card is untrusted."""
    texts = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    facts: dict[str, Any] = {name: value if isinstance(value, str) else None for name, value in texts.items()}
    return facts | {"language": _languages(card.get("language"))}


def _languages(value: Any) -> list[str]:
    """Those of the languages that the Hub accepts on a card; it refuses a card with any other."""
    entries = value if isinstance(value, list) else [value]
    entries = ["no" if entry is False else entry for entry in entries]  # Norwegian, as YAML 1.1 reads it
    named = [part for entry in entries if isinstance(entry, str) for part in re.split(r"[,\s]+", entry)]
    return [name for name in dict.fromkeys(named) if _LANGUAGE.fullmatch(name)]


def identity(source: Source) -> dict[str, Any]:
    """Identifies a source for a resumed run: repository and commit, or size and modification time of the local
    files."""
    if source.base.commit:
        return {"repo": source.base.repo_id, "commit": source.base.commit}
    paths = (
        [source.gguf]
        if source.gguf
        else [source.folder / name for name in source.files.weights]
        if source.folder
        else []
    )
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
