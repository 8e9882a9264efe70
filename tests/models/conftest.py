"""GGUF files as llama.cpp's tools write them, of tiny models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Merges of the tiny byte-level BPE, whose other tokens are all bytes and three special ones.
SPECIALS = ["<unk>", "<start>", "<end>"]
MERGES = ["h e", "he l", "l o", "1 2", "12 3"]
SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rope_theta": 10_000.0,
    "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip


def byte_level() -> dict[str, Any]:
    """Metadata of the tiny byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = SPECIALS + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]
    return {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": MERGES, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0,
        "add_bos_token": False,
    }  # fmt: skip


def tiny(model_type: str, **changes: Any) -> Any:
    """A tiny model of transformers with random weights, none of them at its initial value."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _metadata(arch: str, config: Any) -> dict[str, Any]:
    keys = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.freq_base": 10_000.0, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if arch.startswith("gemma"):
        keys["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _tensors(arch: str, model: Any) -> dict[str, np.ndarray]:
    import gguf

    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), model.config.num_hidden_layers
    )
    tied = model.config.tie_word_embeddings
    found: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = value.float().numpy()
        if arch.startswith("gemma") and "norm" in name:
            values = values + np.float32(1)
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        if arch == "llama" and (count := heads.get(name.split(".")[-2])):
            values = values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        found[gguf_name] = np.ascontiguousarray(values)
    return found


def write_file(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A GGUF file of these keys and float32 tensors."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        first = value[0] if isinstance(value, list) and value else value
        kind = (
            GGUFValueType.BOOL if isinstance(first, bool) else GGUFValueType.UINT32 if isinstance(first, int)
            else GGUFValueType.FLOAT32 if isinstance(first, float) else GGUFValueType.STRING
        )  # fmt: skip
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    arch: str,
    model: Any,
    *,
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: Sequence[str] = (),
) -> None:
    """The model and its tokenizer, with other `keys` (None: left out), `extra` tensors, and `without` some tensors."""
    metadata = _metadata(arch, model.config)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or byte_level()).items()}
    metadata |= dict(keys or {})
    tensors = _tensors(arch, model) | dict(extra or {})
    write_file(
        path,
        arch,
        {key: value for key, value in metadata.items() if value is not None},
        {name: values for name, values in tensors.items() if name not in without},
    )


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., None]:
    """See `write_model`."""
    return write_model


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """See `tiny`."""
    return tiny


@pytest.fixture
def byte_level_keys() -> dict[str, Any]:
    """See `byte_level`."""
    return byte_level()


@pytest.fixture(scope="session")
def llama() -> Any:
    """One tiny Llama for tests that do not change it."""
    return tiny("llama", tie_word_embeddings=False)
