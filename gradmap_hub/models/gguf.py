"""A .gguf file as a model source: dequantise it once into a Hugging Face folder.

Nothing is guessed. Architecture, metadata keys, tensors, their shapes and the rules of the tokenizer are compared with
tables of what is converted exactly; anything else is refused, with its name, before any tensor is read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.errors import SourceError
from gradmap_hub.files import usual_mode
from gradmap_hub.layout import CONFIG, WEIGHTS, WEIGHTS_INDEX
from gradmap_hub.models.gguf_header import USE_ORIGINAL, GgufHeader, GgufTensor, read_gguf_header
from gradmap_hub.models.gguf_rope import FACTORS, llama3_scaling, stated_scaling

if TYPE_CHECKING:
    from numpy import ndarray

# float32 bytes per weight file.
_SHARD_BYTES = 2_000_000_000
# The deepest known model has 126 layers, and the widest 53,248 features.
_MOST_LAYERS = 1_000
_WIDEST = 1 << 20


@dataclass(frozen=True)
class _Family:
    """One architecture of GGUF files. `layer`: tensors of a layer, GGUF name -> name in transformers; `keys`: metadata
    keys beside those of all families; `permuted`: query and key weights are stored in llama.cpp's order for rotary
    embeddings; `norm_offset`: added to the norm weights in GGUF files, but not in transformers."""

    model_type: str
    causal_lm: str
    layer: Mapping[str, str]
    keys: Sequence[str] = ()
    permuted: bool = False
    norm_offset: float = 0.0
    # With this depth, attention is scaled by the width per head instead of the size of a head (Gemma 27B).
    scaled_by_width: int | None = None


_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    **{
        f"{theirs}.weight": f"self_attn.{ours}.weight"
        for theirs, ours in (
            ("attn_q", "q_proj"),
            ("attn_k", "k_proj"),
            ("attn_v", "v_proj"),
            ("attn_output", "o_proj"),
        )
    },
}
_MLP = {f"ffn_{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_LLAMA = {**_ATTENTION, "ffn_norm.weight": "post_attention_layernorm.weight", **_MLP}
_BIASES = {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
_HEAD_NORMS = {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
_SANDWICH = {
    **_ATTENTION,
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    **_MLP,
}
_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", _LLAMA, permuted=True),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", _LLAMA | _BIASES),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _LLAMA | _HEAD_NORMS),
    "gemma2": _Family(
        "gemma2", "Gemma2ForCausalLM", _SANDWICH,
        ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        norm_offset=1.0, scaled_by_width=46,
    ),
    "gemma3": _Family(
        "gemma3_text", "Gemma3ForCausalLM", _SANDWICH | _HEAD_NORMS,
        ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
        norm_offset=1.0, scaled_by_width=62,
    ),
}  # fmt: skip
_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scale_linear", "expert_count", "expert_used_count", "tensor_data_layout",
)  # fmt: skip
# Gemma 3: every sixth layer has full attention; transformers has the same default.
_PATTERN = 6


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file that passed all checks. `config`: the content of its config.json; `names`: GGUF tensor -> tensor in
    transformers."""

    header: GgufHeader
    config: dict[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def license(self) -> str | None:
        """The licence that the file states, or None."""
        value = self.header.metadata.get("general.license")
        return value if isinstance(value, str) else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in float32."""
        return sum(4 * math.prod(self.header.tensors[name].shape) for name in self.names)


def open_gguf(path: Path) -> GgufModel:
    """Read and check a GGUF file. No tensor data is read, except Llama 3.1's rotary factors.

    Raises:
        SourceError: the file does not exist, or has an architecture, a metadata key, a tensor or a tokenizer that is
            not supported.
        BrokenCheckpointError: it is damaged, or a tensor or key is missing or has a wrong shape or value.
    """
    from gradmap_hub.models.gguf_tokenizer import check_tokenizer

    header = read_gguf_header(path)
    family = _FAMILIES.get(header.architecture)
    if family is None:
        raise SourceError(
            f"{path.name} has the architecture {header.architecture!r}, which is not supported.",
            hint=f"Supported in GGUF files: {', '.join(_FAMILIES)}. {USE_ORIGINAL}",
        )
    _refuse_unknown_keys(header, family)
    config = _config(header, family)
    names = _check_tensors(header, family, config)
    if FACTORS in header.tensors:
        factors = values_of(header, header.tensors[FACTORS]).reshape(-1).tolist()
        config["rope_scaling"] = llama3_scaling(header, config, factors)
    check_tokenizer(header, config["vocab_size"])
    return GgufModel(header, config, names)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` as float32 safetensors, config and tokenizer into `folder`. tokenizer_config.json is
    written last.

    Raises:
        SourceError, BrokenCheckpointError: see `open_gguf`.
    """
    from gradmap_hub.models.gguf_tokenizer import write_tokenizer

    model = open_gguf(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(model, folder)
    _write_json(folder / CONFIG, model.config)
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {key: model.config[key] for key in named if key in model.config})
    write_tokenizer(model.header, folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- metadata --------------------------------------------------------------------------------------------------------


def _refuse_unknown_keys(header: GgufHeader, family: _Family) -> None:
    """Raises SourceError: a metadata key is unknown and may change what the model computes."""
    known = {f"{header.architecture}.{key}" for key in (*_KEYS, *family.keys)}
    for key in header.metadata:
        if key.startswith(f"{header.architecture}.") and key not in known:
            raise header.not_known(f"the metadata key {key}")
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise SourceError(f"{header.path.name}: general.type is {str(kind)[:40]!r}; 'model' is expected.")
    experts = header.integer(f"{header.architecture}.expert_count", 0, _WIDEST, 0)
    if experts:
        raise header.not_known(f"a mixture of {experts} experts")


def _config(header: GgufHeader, family: _Family) -> dict[str, Any]:
    """The content of config.json, in the form that transformers 4.57 and 5 both read."""
    prefix = header.architecture

    def integer(key: str, high: int, default: int | None = None) -> int:
        return header.integer(f"{prefix}.{key}", 1, high, default)

    layers, width = integer("block_count", _MOST_LAYERS), integer("embedding_length", _WIDEST)
    heads = integer("attention.head_count", width)
    kv_heads = integer("attention.head_count_kv", heads, heads)
    if heads % kv_heads:
        raise header.wrong(f"{prefix}.attention.head_count_kv", f"a divisor of {heads}")
    if f"{prefix}.attention.key_length" not in header.metadata and width % heads:
        raise header.wrong(f"{prefix}.attention.head_count", f"a divisor of {width}")
    head = integer("attention.key_length", _WIDEST, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, _WIDEST, head) != head or head % 2:
            raise header.not_known(f"{prefix}.{key} of another size than a head, or an odd head size ({head})")
    if "token_embd.weight" not in header.tensors:
        raise header.broken("the tensor token_embd.weight is missing")
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    if integer("vocab_size", 1 << 24, vocabulary) != vocabulary:
        raise header.wrong(f"{prefix}.vocab_size", f"the number of embeddings, {vocabulary:,},")
    config: dict[str, Any] = {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": integer("feed_forward_length", _WIDEST),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": integer("context_length", 1 << 31),
        "rms_norm_eps": header.number(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        "rope_theta": header.number(f"{prefix}.rope.freq_base", 1.0, 1e15, 10_000.0),
        "rope_scaling": stated_scaling(header),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in header.metadata:
            config[f"{name}_token_id"] = header.integer(f"tokenizer.ggml.{key}_token_id", 0, vocabulary - 1)
    return config | _gemma(header, family, config)


def _gemma(header: GgufHeader, family: _Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of Gemma 2 and 3: sliding window, soft caps, and the scale of attention."""
    if family.scaled_by_width is None:
        return {}
    prefix = header.architecture
    by_width = config["num_hidden_layers"] == family.scaled_by_width
    found: dict[str, Any] = {
        "sliding_window": header.integer(f"{prefix}.attention.sliding_window", 1, 1 << 31),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if by_width
        else config["head_dim"],
    }
    if prefix == "gemma2":
        # llama.cpp's defaults.
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
            found[key] = header.number(f"{prefix}.{key}", 1e-3, 1e6, default)
    else:
        header.integer(f"{prefix}.attention.sliding_window_pattern", _PATTERN, _PATTERN, _PATTERN)
        found["rope_local_base_freq"] = header.number(f"{prefix}.rope.freq_base_swa", 1.0, 1e15, 10_000.0)
    return found


# -- tensors ---------------------------------------------------------------------------------------------------------


def _check_tensors(header: GgufHeader, family: _Family, config: Mapping[str, Any]) -> dict[str, str]:
    """{GGUF name: name in transformers} of all tensors.

    Raises:
        BrokenCheckpointError: one is missing, or has a wrong shape.
        SourceError: one is unknown, or is stored in a type that cannot be dequantised.
    """
    shapes = _shapes(config)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        names["output.weight"] = "lm_head.weight"
    for layer in range(config["num_hidden_layers"]):
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{ours}" for name, ours in family.layer.items()}
    missing = [name for name in names if name not in header.tensors]
    if missing:
        raise header.broken(f"the tensor {missing[0]} is missing ({len(missing):,} of {len(names):,} tensors are)")
    for name, tensor in header.tensors.items():
        if name == FACTORS and family.permuted:  # checked on its own
            continue
        if name not in names:
            raise header.not_known(f"the tensor {name}")
        wanted = shapes[name.split(".", 2)[-1] if name.startswith("blk.") else name]
        if tensor.shape != wanted:
            raise header.broken(f"the tensor {name} has the shape {list(tensor.shape)}, not {list(wanted)}")
    _check_kinds(header)
    return names


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its GGUF name; tensors of a layer without `blk.N.`."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    vocabulary = (config["vocab_size"], width)
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    return {
        "token_embd.weight": vocabulary,
        "output.weight": vocabulary,
        "output_norm.weight": (width,),
        **{f"{name}.weight": (width,) for name in norms},
        **{f"attn_{name}_norm.weight": (head,) for name in "qk"},
        "attn_q.weight": (queries, width),
        "attn_k.weight": (keys, width),
        "attn_v.weight": (keys, width),
        "attn_output.weight": (width, queries),
        "attn_q.bias": (queries,),
        "attn_k.bias": (keys,),
        "attn_v.bias": (keys,),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
    }


def _check_kinds(header: GgufHeader) -> None:
    """Raises SourceError: a tensor is stored in a type that cannot be dequantised."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind, tensor in {tensor.kind: tensor for tensor in header.tensors.values()}.items():
        quantization = GGMLQuantizationType(kind)
        try:
            block = np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8)
            readable = dequantize(block, quantization).dtype == np.float32
        except NotImplementedError:
            readable = False
        if not readable:
            raise header.not_known(f"the tensor {tensor.name} of type {quantization.name}")


def values_of(header: GgufHeader, tensor: GgufTensor) -> ndarray:
    """A tensor of the file, dequantised to float32."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quant_shape_to_byte_shape

    kind = GGMLQuantizationType(tensor.kind)
    stored = np.memmap(header.path, np.uint8, "r", tensor.start, (tensor.bytes,))
    return dequantize(np.asarray(stored).reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)


def _converted(model: GgufModel, name: str) -> ndarray:
    """The values of a tensor in float32, in the form that transformers expects."""
    import numpy as np

    family = _FAMILIES[model.header.architecture]
    values = values_of(model.header, model.header.tensors[name])
    if family.norm_offset and name.endswith("norm.weight"):
        values = values - np.float32(family.norm_offset)
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    if family.permuted and (key := heads.get(name.split(".", 2)[-1])):
        # llama.cpp interleaves the two halves that transformers rotates.
        pairs = values.reshape(model.config[key], model.config["head_dim"] // 2, 2, -1)
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def _write_weights(model: GgufModel, folder: Path) -> None:
    """Write model.safetensors, or its shards and their index."""
    from safetensors.numpy import save_file

    shards = list(_shards(model))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {model.names[tensor]: _converted(model, tensor) for tensor in shard},
            folder / name, metadata={"format": "pt"},
        )  # fmt: skip
        (folder / name).chmod(usual_mode())  # safetensors creates them 0600
        index |= dict.fromkeys((model.names[tensor] for tensor in shard), name)
    if len(shards) > 1:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": model.weight_bytes}, "weight_map": index})


def _shards(model: GgufModel) -> Iterator[list[str]]:
    """The GGUF names of the tensors of each weight file."""
    shard: list[str] = []
    size = 0
    for name in model.names:
        count = 4 * math.prod(model.header.tensors[name].shape)
        if shard and size + count > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += count
    yield shard


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
