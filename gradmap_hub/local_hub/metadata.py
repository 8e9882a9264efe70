"""The JSON that the API returns about a repository: its info and the rows of its tree."""

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from .cards import RELATIONS, parse_front_matter
from .gitids import Entry, pointer, tree_ids
from .names import RepoKey
from .objects import Commit, Objects
from .store import RepoState, Store

_ADAPTER_FILES = {"adapter_config.json"}


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
        info |= {
            "sdk": card.get("sdk", state.space.sdk),
            "tags": [card.get("sdk", state.space.sdk), *_texts(card.get("tags")), "region:us"],
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
    sdk = card.get("sdk", space.sdk)
    app_file = card.get("app_file") or {"docker": "Dockerfile", "static": "index.html"}.get(sdk, "app.py")
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
    """A tree row with the fields that ``expand=True`` adds."""
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
    model_type = config.get("model_type")
    library = card.get("library_name") or ("transformers" if isinstance(model_type, str) else None)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    pipeline = card.get("pipeline_tag") or ("text-generation" if library == "transformers" and causal else None)
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
        "config": {name: config[name] for name in ("architectures", "model_type") if name in config},
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
        with objects.file(entry).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 32 * 1024 * 1024:
                return {}
            try:
                header = json.loads(file.read(length))
            except ValueError:
                return {}
        for name, tensor in header.items() if isinstance(header, dict) else ():
            if name == "__metadata__":
                continue
            try:
                elements = 1
                for size in tensor["shape"]:
                    elements *= int(size)
                counts[str(tensor["dtype"])] = counts.get(str(tensor["dtype"]), 0) + elements
            except (KeyError, TypeError, ValueError):
                return {}
    return counts


def _read_json(objects: Objects, entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return {}
    try:
        # Python parses NaN, but a JSON response cannot contain it.
        value = json.loads(objects.read(entry), parse_constant=lambda _: None)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> list[str]:
    values: Iterable[object] = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
