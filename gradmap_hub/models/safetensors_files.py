"""The files of a model source, checked by names, sizes and headers alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gradmap_hub.errors import BrokenCheckpointError, SourceError
from gradmap_hub.files import MOST_BYTES, InvalidJson, parse_json, read_json, shown, write_text
from gradmap_hub.layout import (
    CONFIG,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    extra_templates,
    is_companion,
)
from gradmap_hub.models.config_fields import check_config
from gradmap_hub.models.transformers_compat import NotInBothForms, both_read_config, both_read_tokenizer_config

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files that ModelOpt, AutoGPTQ and AutoAWQ write beside quantised weights.
_QUANTIZED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_FULL_PRECISION = "Use its full-precision original."
# A plain file name: no folder in it, and no wildcard, which a download would expand.
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,200}\.safetensors")
# The limit of the safetensors library.
_LONGEST_HEADER = 100_000_000
_LONGEST_NAME = 500
# The limit of torch.
_MOST_DIMENSIONS = 64
ADAPTER_CONFIG = "adapter_config.json"
"""What peft writes beside an adapter. transformers with peft loads the model that it names."""
# Fields of a config.json that change how transformers loads a checkpoint. Quantised checkpoints are refused before.
_LOADING = frozenset({
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "use_kernels",
    "return_dict", "use_return_dict", "torchscript", "transformers_weights",
    "quantization_config", "compression_config", "quantization",
})  # fmt: skip
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are not quantised."""


@dataclass(frozen=True)
class Files:
    """The files to fetch from a source: `weights` (with the index, if sharded; their size is `weight_bytes`) and
    `companions`."""

    weights: tuple[str, ...]
    companions: tuple[str, ...]
    weight_bytes: int


def choose_files(sizes: Mapping[str, int], fetched: Callable[[str], Path]) -> Files:
    """Select safetensors weights and companion files from a listing {path: bytes}.

    The index, if there is one, decides which files are weights: others beside them may be another precision, or the
    same weights for another program. `fetched` returns the local path of a file of the listing; it is called for the
    index only.

    Raises:
        SourceError: there are no weights, or only those of an adapter, or they are quantised.
        BrokenCheckpointError: there are only pickled weights, or the index does not name files of the listing.
    """
    top = {name: size for name, size in sizes.items() if "/" not in name}
    companions = tuple(name for name in sizes if is_companion(name))
    for name in _QUANTIZED:
        if name in top:
            raise SourceError(f"The checkpoint is quantised, as {name} says.", hint=_FULL_PRECISION)
    if WEIGHTS in top:
        return Files((WEIGHTS,), companions, top[WEIGHTS])
    if WEIGHTS_INDEX in top:
        check_json_size(WEIGHTS_INDEX, top[WEIGHTS_INDEX])
        shards = sorted(set(read_weight_map(fetched(WEIGHTS_INDEX)).values()))
        missing = [shard for shard in shards if shard not in top]
        if missing:
            raise BrokenCheckpointError(f"The shard {missing[0]} named in {WEIGHTS_INDEX} is missing.")
        return Files((WEIGHTS_INDEX, *shards), companions, sum(top[name] for name in shards))
    if ADAPTER_CONFIG in top:
        raise only_adapter("The source")
    if any(name.endswith(_PICKLES) for name in top):
        raise BrokenCheckpointError(
            "The weights are pickle files, which can run code when loaded, and are never opened.",
            hint="Use a revision with model.safetensors, or convert the checkpoint to safetensors first.",
        )
    raise SourceError(
        "The source has no safetensors weights (model.safetensors).",
        hint="Give a causal language model in safetensors format, or a .gguf file.",
    )


def only_adapter(name: str) -> SourceError:
    """The error of a source without weights of its own."""
    return SourceError(
        f"{name} is an adapter, such as LoRA, without the model it belongs to.",
        hint="Merge it into its base model first (`merge_and_unload` of peft), and give the result.",
    )


def check_json_size(name: str, size: int) -> None:
    """Check the size in bytes of a JSON file, before it is fetched.

    Raises:
        SourceError: it is larger than MOST_BYTES.
    """
    if size > MOST_BYTES:
        raise SourceError(f"{name} has {size:,} bytes; at most {MOST_BYTES:,} are read.")


def read_weight_map(path: Path) -> dict[str, str]:
    """The weight map of an index: {tensor: name of the shard beside the index}.

    Raises:
        SourceError: the index is not JSON.
        BrokenCheckpointError: it has no such map.
    """
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BrokenCheckpointError(f"{WEIGHTS_INDEX} does not map tensors to shards.")
    for tensor, shard in found.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise BrokenCheckpointError(
                f"{WEIGHTS_INDEX} names {shown(shard)} as the shard of {shown(tensor)}; "
                "the name of a .safetensors file beside it is expected."
            )
    return found


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
        if not path.is_file():  # missing, or a folder or a pipe
            raise FileNotFoundError(path)
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


def readable(folder: Path, stand_in: Path, names: Collection[str] | None = None) -> Path:
    """A model folder that transformers 4.57 and 5 both load as the same model: the folder itself, or one in `stand_in`
    with translated config.json and tokenizer_config.json and links to the other files.

    The second is needed if transformers 5 saved the folder in its own form, if the config has settings of the loader,
    or if the folder has further files that transformers would load as well.

    Args:
        stand_in: Parent of the translated folders, one per model folder.
        names: The files of the model; None: all files of the folder.
    """
    config, tokenizer = read_config(folder / CONFIG), folder / TOKENIZER_CONFIG
    saved = read_object(tokenizer) if tokenizer.is_file() else {}
    present = [path for path in folder.iterdir() if path.is_file()]
    chosen = [path for path in present if names is None or path.name in names]
    strangers = {path.name for path in present} - {path.name for path in chosen}
    alone = not any(name == ADAPTER_CONFIG or name.endswith(".safetensors") for name in strangers)
    if alone and _loadable(config) == config and both_read_tokenizer_config(saved) == saved:
        return folder
    stand_in = stand_in / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    stand_in.mkdir(parents=True, exist_ok=True)
    translated = {CONFIG: _loadable(config), TOKENIZER_CONFIG: both_read_tokenizer_config(saved)}
    for path in chosen:
        if path.name not in translated:
            _link(path.resolve(), stand_in / path.name)
    for name in extra_templates(folder):
        (stand_in / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, stand_in / name)
    for name, content in translated.items():
        text, target = json.dumps(content, indent=2, ensure_ascii=False) + "\n", stand_in / name
        if (folder / name).is_file() and not (target.is_file() and target.read_text(encoding="utf-8") == text):
            write_text(target, text)
    return stand_in


def _loadable(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the form that 4.57 and 5 both read, without fields that tell how to load the model instead of
    what it is: kernels that need packages or a download, other weight files, a null quantisation."""
    result = {name: value for name, value in in_both_forms(config).items() if name not in _LOADING}
    return {name: value for name, value in result.items() if name not in ("dtype", "torch_dtype") or value != "auto"}


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, or a copy; replaces what was there."""
    if target.is_symlink():
        if Path(os.readlink(target)) == source:
            return
        target.unlink()
    try:
        os.symlink(source, target)
        return
    except OSError:  # some file systems, and most users of Windows
        pass
    if not (target.is_file() and _stamp(target) == _stamp(source)):
        shutil.copy2(source, target)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_weights(folder: Path, files: Files) -> None:
    """Read the header of every safetensors file and compare it with the file's size and the index.

    Raises:
        BrokenCheckpointError: a file is truncated, too long or unreadable, or a shard or tensor is missing.
        SourceError: weights are quantised.
    """
    present: dict[str, str] = {}
    shards = [name for name in files.weights if name.endswith(".safetensors")]
    wanted = read_weight_map(folder / WEIGHTS_INDEX) if WEIGHTS_INDEX in files.weights else None
    for shard in shards:
        header = read_safetensors_header(folder / shard)
        check_dtypes(shard, {name: entry["dtype"] for name, entry in header.items()})
        for name in header:
            # Which of two tensors is loaded depends on the reader.
            if wanted is not None and wanted.get(name, shard) != shard:
                other = f"{WEIGHTS_INDEX} names {wanted[name]}"
                raise BrokenCheckpointError(f"{shard} contains the tensor {name}, for which {other}.")
            present[name] = shard
    lost = sorted(set(wanted or ()) - set(present))
    if lost:
        raise BrokenCheckpointError(f"{WEIGHTS_INDEX} names the tensor {lost[0]}, which no shard contains.")


def check_dtypes(shard: str, dtypes: Mapping[str, str]) -> None:
    """Check the dtypes of a weight file, {tensor: safetensors' name of its dtype}.

    Raises:
        SourceError: a weight is quantised.
    """
    for name, dtype in dtypes.items():
        if dtype not in FLOATS and _is_weight(name):
            raise SourceError(f"The checkpoint is quantised: {shard} stores {name} as {dtype}.", hint=_FULL_PRECISION)


def _is_weight(name: str) -> bool:
    """Whether a tensor is a weight, judged by its name: checkpoints of GPT-Neo and GPT-NeoX also have integer masks and
    positions."""
    last = name.rpartition(".")[2]
    return "weight" in last or "proj" in last or last.endswith(("_blocks", "_packed"))


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file: {name: {dtype, shape, data_offsets}}. All names are printable, all shapes
    and offsets integers, and every tensor of a known dtype has the bytes of its shape.

    Raises:
        BrokenCheckpointError: the file is truncated or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            if length > _LONGEST_HEADER:
                raise ValueError(f"the header has {length:,} bytes, and at most {_LONGEST_HEADER:,} are read")
            header = parse_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        header.pop("__metadata__", None)
        data_end = max((_end_of(name, entry) for name, entry in header.items()), default=0)
    except (struct.error, ValueError) as error:
        raise BrokenCheckpointError(
            f"{path.name} is not a readable safetensors file: {error}", hint="Fetch it again."
        ) from error
    if 8 + length + data_end != size:
        raise BrokenCheckpointError(
            f"{path.name} is damaged: {size:,} bytes, but its header describes {8 + length + data_end:,}.",
            hint="Fetch it again.",
        )
    return header


def _end_of(name: str, entry: Any) -> int:
    """Where the data of a tensor ends. Raises ValueError: its entry is not that of a tensor."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"the name {shown(name)} is not that of a tensor")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {shown(entry)}, not a tensor")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not dtype.replace("_", "").isalnum():
        raise ValueError(f"{name} has the dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has the offsets {shown(offsets)}")
    itemsize = BYTES.get(dtype)
    if itemsize is not None and math.prod(shape) * itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]:,} bytes, and its shape is {shown(shape)} in {dtype}")
    return offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # The size of a file fits into 63 bits.
    return isinstance(value, list) and all(
        isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 1 << 63 for entry in value
    )
