"""A .gguf file as a model source: dequantise it once into a Hugging Face folder.

transformers reads the weights correctly but guesses parts of the tokenizer (for llama-architecture files with a
byte-level BPE it sets eos = bos, adds a BOS the model never saw and loses the digit split). The file's metadata is
correct and overrides it here.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradmap_hub.errors import BrokenCheckpointError, SourceError
from gradmap_hub.models.safetensors_files import clean_config
from gradmap_hub.models.transformers_compat import has_5

# llama.cpp names the pre-tokenizer in `tokenizer.ggml.pre`; the splitting rules of these byte-level BPE variants are
# known exactly. Others keep the pre-tokenizer of transformers.
_DIGITS_THEN_BYTES = {"smollm", "codeshell", "refact", "starcoder", "command-r"}
_BYTES_ONLY = {"gpt-2", "default"}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the scalar key/value metadata of a GGUF file (no tensors are read).

    Raises:
        SourceError: the file does not exist.
        BrokenCheckpointError: it is not a readable GGUF file, or is truncated.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise SourceError(f"No such file: {path}", hint="Give a Hub id, a folder or a .gguf file.")
    try:
        reader = GGUFReader(str(path))
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.") or len(field.data) <= 1
        }
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise BrokenCheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error
    return fields


def gguf_config(path: Path) -> dict[str, Any]:
    """The transformers config.json of a GGUF file, without reading its tensors."""
    from transformers import AutoConfig

    with _quiet():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    return config.to_dict()


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` as float32 safetensors, config and tokenizer into `folder`.

    Raises:
        BrokenCheckpointError: tensors or tokenizer cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet(), _read_once():
            metadata = read_metadata(path)
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, **_unpacked()
            )
            _forget_quantization(model)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise BrokenCheckpointError(f"{path.name} cannot be read as a model: {error}") from error
    model.save_pretrained(folder)
    clean_config(folder / "config.json")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors creates them 0600
    _mend_tokenizer(tokenizer, metadata)
    tokenizer.save_pretrained(folder)
    _mend_tokenizer_config(folder / "tokenizer_config.json")


def _unpacked() -> dict[str, Any]:
    """Arguments that make transformers 5 dequantise the weights, as 4.57 always does."""
    if not has_5():
        return {}
    from transformers import GgufConfig  # pyright: ignore - of transformers 5

    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_quantization(model: Any) -> None:
    """transformers 5 still marks the dequantised model as quantised, and refuses to save it."""
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def _mend_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers, processors

    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if pre in _DIGITS_THEN_BYTES:
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        elif pre in _BYTES_ONLY:
            backend.pre_tokenizer = byte_level
        elif pre == "qwen2":
            pattern = (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        backend.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token") is False:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("pad_token", "padding_token_id"),
        ("unk_token", "unknown_token_id"),
    ):
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(token_id)))


def _mend_tokenizer_config(path: Path) -> None:
    """Make AutoTokenizer load tokenizer.json unchanged, instead of rebuilding it as a Llama tokenizer."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for stale in (
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "legacy",
        "model_type",
        "use_default_system_prompt",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
    ):
        config.pop(stale, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # The generic class would add token_type_ids, which `generate` rejects.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Share one reader per file. transformers reads the whole header, with vocabulary and merges, once each for config,
    weights and tokenizer, which is most of the time for a small model."""
    import gguf

    reader, made = gguf.GGUFReader, dict[str, Any]()

    def shared(path: str, *arguments: Any, **options: Any) -> Any:
        if str(path) not in made:
            made[str(path)] = reader(path, *arguments, **options)
        return made[str(path)]

    gguf.GGUFReader = shared
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' own GGUF progress bar and its legacy-tokenizer warning."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
