"""The JSON that the API returns about a repository: its info and the rows of its tree."""

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from gradmap_hub.files import parse_json

from .cards import RELATIONS, parse_front_matter
from .gitids import Entry, pointer, tree_ids
from .names import RepoKey
from .objects import Commit, Objects
from .store import RepoState, Store

_ADAPTER_FILES = {"adapter_config.json"}
#: Limit in bytes of a safetensors header. Shards of the largest published models have headers of less than 2 MB.
_HEADER_LIMIT = 8 * 1024 * 1024
#: Limit in bytes of a config.json; a longer one is ignored.
_CONFIG_LIMIT = 1024 * 1024
#: Limit of dimensions of a tensor, as in NumPy.
_RANK_LIMIT = 64
#: Limit of elements of a tensor: safetensors counts them in 64 bits.
_PARAMETER_LIMIT = 2**63


def repo_info(store: Store, key: RepoKey, state: RepoState, oid: str, blobs: bool = False) -> dict[str, Any]:
    """The JSON of model_info, dataset_info and space_info."""
    commit = store.commit_info(key, oid)
    files = store.files(key, oid)
    card = read_card(store.objects(key), files)
    info: dict[str, Any] = {
        "_id": state.internal_id,
        "id": key.id,
        "author": key.namespace,
        "sha": oid,
        "lastModified": commit.date,
        "createdAt": state.created_at,
        "private": state.private,
        "gated": state.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "cardData": card,
        "usedStorage": sum(entry.size for entry in files.values()),
        "siblings": [_sibling(path, entry, blobs) for path, entry in files.items()],
    }
    if key.type == "model":
        info |= _model_facts(key, store.objects(key), files, card)
    elif key.type == "dataset":
        info["tags"] = [*_card_tags(card), "region:us"]
    elif state.space is not None:
        subdomain = f"{key.namespace}-{key.name}".lower().replace(".", "-").replace("_", "-")
        sdk = _text(card, "sdk") or state.space.sdk
        info |= {
            "sdk": sdk,
            "tags": [sdk, *_texts(card.get("tags")), "region:us"],
            "subdomain": subdomain,
            "runtime": space_runtime(state, card, files),
            "models": _texts(card.get("models")),
            "datasets": _texts(card.get("datasets")),
        }
    return info


def read_card(objects: Objects, files: Mapping[str, Entry]) -> dict[str, Any]:
    """The front matter of README.md; empty if it is missing, invalid or stored as LFS."""
    entry = files.get("README.md")
    if entry is None or entry.sha256 is not None:
        return {}
    try:
        return parse_front_matter(objects.read(entry).decode("utf-8", "replace")) or {}
    except ValueError:
        return {}


def space_runtime(state: RepoState, card: Mapping[str, Any], files: Mapping[str, Entry]) -> dict[str, Any]:
    """The runtime JSON of a Space in its current build stage. ``state.space`` must be set."""
    assert state.space is not None
    space, build = state.space, state.build.of(state.branches["main"])
    sdk = _text(card, "sdk") or space.sdk
    app_file = _text(card, "app_file") or {"docker": "Dockerfile", "static": "index.html"}.get(sdk, "app.py")
    # A static Space needs no build.
    ready = "RUNNING" if sdk == "static" else build.stage
    stage = ready if app_file in files else "NO_APP_FILE"
    requested = space.hardware or "cpu-basic"
    runtime: dict[str, Any] = {
        "stage": stage,
        "hardware": {"current": requested if stage in ("APP_STARTING", "RUNNING") else None, "requested": requested},
        "storage": space.storage,
        "gcTimeout": space.sleep_time or 172800,
        "replicas": {"requested": 1},
        "devMode": False,
        # The Hub lists <subdomain>.hf.space here, which could be somebody else's Space.
        "domains": [],
    }
    if stage == "BUILD_ERROR":
        runtime["errorMessage"] = build.error
    return runtime


def file_row(path: str, entry: Entry) -> dict[str, Any]:
    """A file in the format of the tree and paths-info endpoints."""
    row: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return row


def tree_rows(files: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """The rows of all files and folders of a commit, by path."""
    rows = {path: file_row(path, entry) for path, entry in files.items()}
    for folder, oid in tree_ids(files).items():
        if folder:
            rows[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return dict(sorted(rows.items()))


def expanded(row: Mapping[str, Any], commit: Commit) -> dict[str, Any]:
    """A tree row with the fields that ``expand=True`` adds; ``commit``: the last one that changed it."""
    extra: dict[str, Any] = {"lastCommit": {"id": commit.id, "title": commit.title, "date": commit.date}}
    if row["type"] == "file":
        # This hub does not scan files.
        extra["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
    return {**row, **extra}


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if blobs:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return row


def _pointer_size(entry: Entry) -> int:
    return len(pointer(entry.sha256 or "", entry.size))


def _model_facts(key: RepoKey, objects: Objects, files: Mapping[str, Entry], card: Mapping[str, Any]) -> dict[str, Any]:
    config = _read_json(objects, files.get("config.json"))
    architectures = _texts(config.get("architectures"))
    model_type = _text(config, "model_type")
    library = _text(card, "library_name") or ("transformers" if model_type else None)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    pipeline = _text(card, "pipeline_tag") or ("text-generation" if library == "transformers" and causal else None)
    suffixes = {PurePosixPath(path).suffix for path in files}
    formats = [name for name in ("onnx", "safetensors", "gguf") if f".{name}" in suffixes]
    tags = [
        library,
        *formats,
        model_type,
        pipeline,
        *_card_tags(card),
        *_base_model_tags(card, files),
        "region:us",
    ]
    info: dict[str, Any] = {
        "modelId": key.id,
        "tags": list(dict.fromkeys(tag for tag in tags if isinstance(tag, str))),
        "pipeline_tag": pipeline,
        "library_name": library,
        "config": {
            name: value for name, value in (("architectures", architectures), ("model_type", model_type)) if value
        },
        "spaces": [],
    }
    if "model-index" in card:
        info["model-index"] = card["model-index"]
    parameters = _safetensors_parameters(objects, files)
    if parameters:
        info["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
    return info


def _card_tags(card: Mapping[str, Any]) -> list[str]:
    tags = _texts(card.get("tags")) + _texts(card.get("language"))
    tags += [f"dataset:{name}" for name in _texts(card.get("datasets"))]
    return tags + [f"license:{name}" for name in _texts(card.get("license"))]


def _base_model_tags(card: Mapping[str, Any], files: Mapping[str, Entry]) -> list[str]:
    """The Hub's base model tags. The relation comes from the card, or else is inferred from the files."""
    bases = _texts(card.get("base_model"))
    relation = card.get("base_model_relation")
    if relation not in RELATIONS:
        if any(path.endswith((".onnx", ".gguf")) for path in files):
            relation = "quantized"
        elif _ADAPTER_FILES & files.keys():
            relation = "adapter"
        else:
            relation = "merge" if len(bases) > 1 else "finetune"
    return [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]


def _safetensors_parameters(objects: Objects, files: Mapping[str, Entry]) -> dict[str, int]:
    """Parameter counts by dtype, from the headers of the top-level safetensors files."""
    counts: dict[str, int] = {}
    for path, entry in files.items():
        if "/" in path or not path.endswith(".safetensors"):
            continue
        try:
            parameters = _header_parameters(objects.file(entry))
        except ValueError:
            return {}
        for dtype, count in parameters:
            counts[dtype] = counts.get(dtype, 0) + count
    return counts


@lru_cache(maxsize=1024)  # a path names its content by hash, and lists of repositories read every header each time
def _header_parameters(file: Path) -> tuple[tuple[str, int], ...]:
    """The parameters of each tensor in a safetensors file, with their dtype.

    Raises:
        ValueError: the header is not one of safetensors, or too large.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"The header has more than {_HEADER_LIMIT} bytes")
        header = parse_json(opened.read(length), finite=True)
    if not isinstance(header, dict):
        raise ValueError("The header is not an object")
    return tuple(_parameters(tensor) for name, tensor in header.items() if name != "__metadata__")


def _parameters(tensor: object) -> tuple[str, int]:
    dtype, shape = (tensor.get("dtype"), tensor.get("shape")) if isinstance(tensor, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError("A tensor needs a dtype and a shape")
    # Each size is checked first: products of large numbers take long, and a size of zero hides the others.
    if len(shape) > _RANK_LIMIT or any(not 0 <= size < _PARAMETER_LIMIT for size in shape):
        raise ValueError("A shape that no file has")
    count = math.prod(shape)
    if count >= _PARAMETER_LIMIT:
        raise ValueError("A shape that no file has")
    return dtype, count


def _read_json(objects: Objects, entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return {}
    try:
        value = parse_json(objects.read(entry, _CONFIG_LIMIT))  # transformers writes Infinity
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str]:
    values: Iterable[object] = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
