"""The files of a model source, checked by names, sizes and headers alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmap_hub.errors import BrokenCheckpointError, SourceError
from gradmap_hub.files import InvalidJson, read_json
from gradmap_hub.layout import (
    COMPANION_FILES,
    CONFIG,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    _is_legal_text,
)
from gradmap_hub.models.config_fields import check_config
from gradmap_hub.models.transformers_compat import NotInBothForms, both_read_config, both_read_tokenizer_config

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Files:
    """The files to fetch from a source: `weights` (with the index, if sharded) and `companions`."""

    weights: tuple[str, ...]
    companions: tuple[str, ...]
    weight_bytes: int


def choose_files(sizes: Mapping[str, int]) -> Files:
    """Select safetensors weights and companion files from a listing {path: bytes}.

    Raises:
        SourceError: there are no weights.
        BrokenCheckpointError: there are only pickled weights.
    """
    top = {name: size for name, size in sizes.items() if "/" not in name}
    companions = tuple(name for name in top if name in COMPANION_FILES or _is_legal_text(name))
    if WEIGHTS in top:
        return Files((WEIGHTS,), companions, top[WEIGHTS])
    if WEIGHTS_INDEX in top:
        shards = tuple(sorted(name for name in top if name.endswith(".safetensors") and "-of-" in name))
        if shards:
            return Files((WEIGHTS_INDEX, *shards), companions, sum(top[name] for name in shards))
    if any(name.endswith(_PICKLES) for name in top):
        raise BrokenCheckpointError(
            "The weights are pickle files, which can run code when loaded, and are never opened.",
            hint="Use a revision with model.safetensors, or convert the checkpoint to safetensors first.",
        )
    raise SourceError(
        "The source has no safetensors weights (model.safetensors).",
        hint="Give a causal language model in safetensors format, or a .gguf file.",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config.json.

    Raises:
        SourceError: it is missing, not JSON, or has a field of a wrong type or out of range (see `check_config`).
    """
    config = read_object(path)
    check_config(config, str(path))
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        SourceError: it is missing, not JSON or not an object.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise SourceError(
            f"{path.parent} has no {path.name}: it is not a transformers model.",
            hint="Give a Hub id (org/model), a folder with config.json and model.safetensors, or a .gguf file.",
        ) from None
    except InvalidJson as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object.")
    return content


def clean_config(path: Path) -> None:
    """Rewrite a config.json for publication: without local paths and references to code that is not copied, and in the
    form that transformers 4.57 and 5 both read, unless only 5 can express it."""
    config = in_both_forms(json.loads(path.read_text(encoding="utf-8")))
    for key in ("_name_or_path", "_model_name_or_path", "auto_map"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def in_both_forms(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the form that transformers 4.57 and 5 both read; unchanged if only 5 can express it."""
    with contextlib.suppress(NotInBothForms):
        return both_read_config(config)
    return config


def copy_tokenizer_config(source: Path, target: Path) -> None:
    """Copy a tokenizer_config.json byte for byte, or translate it if transformers 4.57 cannot read it."""
    config = read_object(source)
    translated = both_read_tokenizer_config(config)
    if translated == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(translated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def readable(folder: Path, stand_in: Path) -> Path:
    """A model folder whose config and tokenizer transformers 4.57 and 5 both read: the folder itself, or, if 5 saved it
    in its own form, `stand_in`, which then has the two files translated and links to all others."""
    config, tokenizer = read_config(folder / CONFIG), folder / TOKENIZER_CONFIG
    saved = read_object(tokenizer) if tokenizer.is_file() else {}
    if in_both_forms(config) == config and both_read_tokenizer_config(saved) == saved:
        return folder
    stand_in.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not (stand_in / path.name).exists():
            _link(path.resolve(), stand_in / path.name)
    for name, translated in ((CONFIG, in_both_forms(config)), (TOKENIZER_CONFIG, both_read_tokenizer_config(saved))):
        if (folder / name).is_file():
            (stand_in / name).unlink()  # a link: its target must not change
            text = json.dumps(translated, indent=2, ensure_ascii=False) + "\n"
            (stand_in / name).write_text(text, encoding="utf-8")
    return stand_in


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target)
    except OSError:  # some file systems, and most users of Windows
        shutil.copyfile(source, target)


def check_weights(folder: Path, files: Files) -> None:
    """Read the header of every safetensors file and compare it with the file's size and the index.

    Raises:
        BrokenCheckpointError: a file is truncated, too long or unreadable, or a shard or tensor is missing.
    """
    present: set[str] = set()
    for name in files.weights:
        if name.endswith(".safetensors"):
            present.update(read_safetensors_header(folder / name))
    if WEIGHTS_INDEX in files.weights:
        index = read_object(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise BrokenCheckpointError(f"{WEIGHTS_INDEX} does not map tensors to shards.")
        missing = [shard for shard in set(index.values()) if not (folder / shard).is_file()]
        if missing:
            raise BrokenCheckpointError(f"The shard {sorted(missing)[0]} named in {WEIGHTS_INDEX} is missing.")
        lost = sorted(set(index) - present)
        if lost:
            raise BrokenCheckpointError(f"{WEIGHTS_INDEX} names the tensor {lost[0]}, which no shard contains.")


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file: {name: {dtype, shape, data_offsets}}.

    Raises:
        BrokenCheckpointError: the file is truncated or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data_end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(
            f"{path.name} is not a readable safetensors file: {error}", hint="Fetch it again."
        ) from error
    if 8 + length + data_end != size:
        raise BrokenCheckpointError(
            f"{path.name} is damaged: {size:,} bytes, but its header describes {8 + length + data_end:,}.",
            hint="Fetch it again.",
        )
    return header
