"""The fields of a config.json that decide what a model computes: their types and ranges.

transformers checks few of them: it multiplies by a string, allocates for a billion layers, or takes "false" for true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.files import shown
from gradmap_hub.models.architectures import ARCHITECTURES, dimension

# The deepest known model has 126 layers.
MOST_LAYERS = 1_000
# Experts of all layers together; Kimi K2 has 61 x 384. Each is some modules in memory, also without weights.
MOST_EXPERTS = 1 << 16
# The widest known model has 53,248 features in a layer, the largest vocabulary 262,400 tokens.
_WIDEST = 1 << 22
_MOST_TOKENS = 1 << 24
# Some families allocate a table with a row for each position; the longest known context is 10,000,000 tokens.
_LONGEST = 1 << 24
_MOST_HEADS = 1 << 14
_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_ATTENTIONS = ("full_attention", "sliding_attention")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional")


@dataclass(frozen=True)
class _Kind:
    """The allowed values of a field, in words and as a predicate. null is always allowed: the field is not set."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int) -> _Kind:
    return _Kind(f"an integer from {least:,} to {most:,}", lambda value: _is_whole(value) and least <= value <= most)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(expected: str, holds: Callable[[float], bool]) -> _Kind:
    return _Kind(
        expected,
        # An integer above the largest float cannot be converted to one.
        lambda value: (
            (isinstance(value, float) or _is_whole(value))
            and abs(value) < 1e300
            and not math.isnan(value)
            and holds(value)
        ),
    )


def _list_of(kind: _Kind, expected: str) -> _Kind:
    return _Kind(expected, lambda value: isinstance(value, list) and all(kind.holds(entry) for entry in value))


def _one_of(*names: str) -> _Kind:
    return _Kind(f"one of {', '.join(names)}", lambda value: value in names)


_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_TEXTS = _list_of(_TEXT, "a list of strings")
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_ANY = _number("a finite number", lambda _: True)
_POSITIVE = _number("a number above 0", lambda value: value > 0)
_SHARE = _number("a number above 0, at most 1", lambda value: 0 < value <= 1)
_PROBABILITY = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_LAYER = _whole(0, MOST_LAYERS)
_WIDTH = _whole(1, _WIDEST)
_PATTERN = _Kind(
    "a number of layers or a string", lambda value: isinstance(value, str) or _whole(1, MOST_LAYERS).holds(value)
)
_TOKEN = _whole(-1, _MOST_TOKENS)
_TOKENS = _Kind(
    "a token id or a list of them",
    lambda value: all(_TOKEN.holds(token) for token in (value if isinstance(value, list) else [value])),
)
_DTYPE = _Kind(
    f"one of {', '.join(_DTYPES)}", lambda value: isinstance(value, str) and value.removeprefix("torch.") in _DTYPES
)


def _table(*rows: tuple[_Kind, str]) -> dict[str, _Kind]:
    return {name: kind for kind, names in rows for name in names.split()}


# Fields of every model type: they decide whether it is supported at all.
_GENERAL = _table((_TEXT, "model_type"), (_TEXTS, "architectures"))
# Fields that a generation_config.json has too.
_SPECIAL = _table((_TOKENS, "bos_token_id eos_token_id pad_token_id"))
# Fields of the supported types, under the names of all families.
_FIELDS = _SPECIAL | _table(
    (_whole(0, MOST_LAYERS), "num_hidden_layers n_layer n_layers num_layers"),
    (_WIDTH, "hidden_size n_embd d_model intermediate_size ffn_dim ffn_hidden_size n_inner word_embed_proj_dim"),
    (_WIDTH, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size head_dim"),
    (_WIDTH, "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim rotary_dim"),
    (_whole(1, _MOST_HEADS), "num_attention_heads n_head n_heads num_heads num_key_value_heads num_kv_heads"),
    (_whole(1, _MOST_TOKENS), "vocab_size"),
    (_whole(1, _LONGEST), "max_position_embeddings n_positions n_ctx max_seq_len seq_length"),
    (_whole(1, _LONGEST), "original_max_position_embeddings"),
    (_whole(0, _LONGEST), "sliding_window window_size"),
    (_whole(1, MOST_LAYERS), "_sliding_window_pattern no_rope_layer_interval"),
    # A string such as "LLLG" in EXAONE 4.
    (_PATTERN, "sliding_window_pattern"),
    (_whole(1, MOST_LAYERS), "decoder_sparse_step"),
    (_LAYER, "max_window_layers first_k_dense_replace num_nextn_predict_layers num_mtp_layers"),
    (_list_of(_LAYER, "a list of layers"), "mlp_only_layers"),
    (_whole(1, MOST_EXPERTS), "num_experts num_local_experts n_routed_experts num_experts_per_tok"),
    (_whole(0, MOST_EXPERTS), "n_shared_experts n_group topk_group"),
    (_PROBABILITY, "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps"),
    (_PROBABILITY, "attention_dropout attn_pdrop resid_pdrop embd_pdrop emb_pdrop hidden_dropout dropout"),
    (_POSITIVE, "rope_theta rotary_emb_base rope_local_base_freq logits_scaling query_pre_attn_scalar"),
    (_POSITIVE, "attn_logit_softcapping final_logit_softcapping clip_qkv expansion_ratio"),
    (_SHARE, "rotary_pct partial_rotary_factor"),
    (_ANY, "residual_multiplier embedding_multiplier attention_multiplier logit_scale routed_scaling_factor"),
    (_ANY, "initializer_range router_aux_loss_coef router_jitter_noise"),
    (_FLAG, "tie_word_embeddings use_cache attention_bias mlp_bias bias use_bias no_bias qkv_bias use_qkv_bias"),
    (_FLAG, "use_sliding_window use_qk_norm qk_layernorm norm_topk_prob output_router_logits enable_bias"),
    (_FLAG, "do_layer_norm_before layer_norm_elementwise_affine _remove_final_layer_norm attention_out_bias"),
    (_FLAG, "alibi multi_query parallel_attn new_decoder_architecture use_parallel_residual learned_pos_emb"),
    (_FLAG, "apply_residual_connection_post_layernorm slow_but_exact scale_attn_weights add_cross_attention"),
    (_FLAG, "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn rope_interleave use_bidirectional_attention"),
    (_FLAG, "output_attentions output_hidden_states is_encoder_decoder is_decoder"),
    (_TEXT, "hidden_act hidden_activation activation activation_function position_embedding_type norm_type"),
    (_DTYPE, "dtype torch_dtype"),
    (_list_of(_one_of(*_ATTENTIONS), f"a list of {' and '.join(_ATTENTIONS)}"), "layer_types"),
    (_list_of(_one_of("global", "local"), "a list of global and local"), "attention_layers"),
    (_list_of(_whole(0, 1), "a list of 0 and 1"), "no_rope_layers"),
    (_Kind("a list", lambda value: isinstance(value, list)), "attention_types"),
    (_OBJECT, "attn_config rope_scaling rope_parameters"),
    (_Kind("an empty object", lambda value: value == {}), "pruned_heads"),
)
# Within rope_scaling and rope_parameters.
_FACTORS = _list_of(_POSITIVE, "a list of numbers above 0")
_ROPE = _table(
    (_one_of(*_ROPE_TYPES), "rope_type type"),
    (_POSITIVE, "rope_theta factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow"),
    (_ANY, "mscale mscale_all_dim"),
    (_SHARE, "partial_rotary_factor"),
    (_whole(1, _LONGEST), "original_max_position_embeddings"),
    (_FACTORS, "short_factor long_factor"),
    (_FLAG, "truncate"),
)
# Fields with an entry for each layer.
_PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Check the fields of a config.json. Of an unsupported model type, only those are checked that tell the type.

    Args:
        name: What error messages call the file.

    Raises:
        SourceError: a field has a wrong type, a value out of range, or a value that contradicts another field.
    """
    for field, found, expected in _wrong(config):
        raise SourceError(
            f"{name}: {field} is {shown(found)}; {expected} is expected.",
            hint="Correct it in config.json, or use another revision of the model.",
        )


def check_generation_config(config: Mapping[str, Any], name: str) -> None:
    """Check the special tokens of a generation_config.json; its other settings are copied unchecked.

    Args:
        name: What error messages call the file.

    Raises:
        SourceError: one of them is not a token id.
    """
    for field, found, expected in _of_kinds(config, _SPECIAL):
        raise SourceError(f"{name}: {field} is {shown(found)}; {expected} is expected.")


def _wrong(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Field, value and what is expected instead, of everything that is wrong."""
    yield from _of_kinds(config, _GENERAL)
    if config.get("model_type") not in ARCHITECTURES:
        return
    yield from _of_kinds(config, _FIELDS)
    for field in ("rope_scaling", "rope_parameters"):
        yield from _rope(field, config.get(field) or {})
    for field, value in config.items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in _numbers(value)):
            yield field, value, "a value without NaN and Infinity"
    yield from _relations(config)


def _of_kinds(
    values: Mapping[str, Any], kinds: Mapping[str, _Kind], prefix: str = ""
) -> Iterator[tuple[str, Any, str]]:
    for field, kind in kinds.items():
        value = values.get(field)
        if value is not None and not kind.holds(value):
            yield prefix + field, value, kind.expected


def _rope(field: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What is wrong in a rotary embedding, or in one per type of layer."""
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    if nested and len(nested) < len(values):
        other = next(key for key in values if key not in nested)
        yield f"{field}.{other}", values[other], "an object"
    for prefix, flat in [(f"{field}.{key}.", value) for key, value in nested.items()] or [(f"{field}.", values)]:
        yield from _of_kinds(flat, _ROPE, prefix)
        needed = ["rope_theta"] if nested else []
        if flat.get("rope_type", flat.get("type")) in ("longrope", "su"):
            needed += ["short_factor", "long_factor"]
        for key in needed:
            if flat.get(key) is None:
                yield prefix + key, None, _ROPE[key].expected


def _relations(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Fields that contradict each other."""
    depth = dimension(config, "num_hidden_layers")
    for field in _PER_LAYER:
        value = config.get(field)
        if value is not None and depth is not None and len(value) != depth:
            yield field, value, f"one entry for each of the {depth} layers"
    heads, groups = dimension(config, "num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and groups is not None and heads % groups:
        yield "num_key_value_heads", groups, f"a divisor of the {heads} attention heads"
    experts = next((config[field] for field in _EXPERTS if config.get(field) is not None), None)
    if experts is not None:
        if (config.get("num_experts_per_tok") or 0) > experts:
            yield "num_experts_per_tok", config["num_experts_per_tok"], f"at most the {experts} experts"
        if experts * (depth or 0) > MOST_EXPERTS:
            yield "num_hidden_layers", depth, f"at most {MOST_EXPERTS // experts} with {experts} experts in each layer"


def _numbers(value: Any) -> Iterator[Any]:
    """All values in lists and objects, which `files.parse_json` has limited in depth."""
    if isinstance(value, (dict, list)):
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for inner in inside:
            yield from _numbers(inner)
    else:
        yield value
