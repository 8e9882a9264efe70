"""Which model types can lose decoder layers, and where their parts sit.

Data, not code: a family is a row. What is not known to be safe is refused by name, on the evidence of
config.json alone, before any weight is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import RemoteCodeRefused, UnsupportedArchitecture
from gradmap_hub.models.transformers_compat import ONLY_5, NotInBothForms, both_read_config, has_5, installed

# The axis of a weight along which the residual stream lies: (d, f) as in nn.Linear, or (f, d) and (d).
ROWS, COLUMNS = -2, -1


@dataclass(frozen=True)
class Condition:
    """A setting of a config (`field` has `value`) and what follows from it."""

    field: str
    value: Any
    reason: str

    def holds(self, config: Any) -> bool:
        """`config`: a config.json or a transformers config."""
        found = config.get(self.field) if isinstance(config, Mapping) else getattr(config, self.field, None)
        return found == self.value


@dataclass(frozen=True)
class Experts:
    """A mixture of experts within a layer. `block`: the module whose output (the first, if it is a tuple) is added to
    the residual stream. `outputs`: patterns of the parameters that write that output, every expert's and the shared
    one's, and the axis along which the stream lies in each: the output is linear in all of them together. `|` stands
    between the names that transformers 4.57 and 5 have for the same.

    transformers 5 holds all experts in one tensor where 4.57 has a module for each, which is how they are stored.
    `stored`: the name of such a tensor within the layer, and of the tensors that a checkpoint has for it: `*` is the
    number of the expert, and several of one expert stand above each other.
    """

    block: str
    outputs: tuple[tuple[str, int], ...]
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Module paths relative to the causal-LM model (`layers`, `final_norm`, `after_norm`) or to one decoder layer.

    `mlp_output` and `attention_output` are linears (nn.Linear, or transformers' transposed Conv1D) that write to the
    residual stream: through `mlp_norm` and `attention_norm` where a norm stands in between, times the layer's attribute
    `residual_multiplier` where there is one. A layer without `mlp_output` has `experts`.

    `stored`: tensors outside the layers that transformers 5 names otherwise than a checkpoint does, see `Experts`.

    `after_norm`: a projection between final norm and head. The head's logits are multiplied by the config field
    `logit_multiplier`, divided by `logit_divisor`, capped by `logit_cap`, as far as they are given.

    Config fields, beside the lists with an entry per layer, that speak of layers by their index: `leading` counts how
    many of the first layers are of another kind; `sparse` stands for `decoder_sparse_step` and `mlp_only_layers`;
    `run_lengths` is the list of which `attention_layers` is made; `dropped` are of weights that no written checkpoint
    has, and become 0.
    """

    model_type: str
    causal_lm: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    mlp_output: str = "mlp.down_proj"
    attention_output: str = "self_attn.o_proj"
    experts: Experts | None = None
    mlp_norm: str | None = None
    attention_norm: str | None = None
    norm_offset: float = 0.0  # what a norm adds to its weight to have its gain
    residual_multiplier: str | None = None
    after_norm: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    logit_cap: str | None = None
    leading: tuple[str, ...] = ()
    sparse: bool = False
    run_lengths: str | None = None
    dropped: tuple[str, ...] = ()
    refused: tuple[Condition, ...] = ()
    uncorrected: tuple[Condition, ...] = ()
    unstreamed: str | None = None
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _experts(block: str, *shared: str) -> Experts:
    """Experts named as in most families; `shared`: what writes the output of those that every token reaches."""
    outputs = ("experts*down_proj*", *shared)
    fused = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    return Experts(
        block,
        tuple((f"{block}.{output}", ROWS) for output in outputs),
        tuple(
            (f"{block}.experts.{name}", tuple(f"{block}.experts.*.{part}.weight" for part in parts))
            for name, parts in fused.items()
        ),
    )


_GPT: dict[str, Any] = {"layers": "transformer.h", "final_norm": "transformer.ln_f"}
_EXPERTS = _experts("mlp")
# The norms around attention and MLP of Gemma 2 and 3, OLMo 2 and 3, EXAONE 4.
_SANDWICH: dict[str, Any] = {"mlp_norm": "post_feedforward_layernorm", "attention_norm": "post_attention_layernorm"}
_GEMMA: dict[str, Any] = {**_SANDWICH, "norm_offset": 1.0, "logit_cap": "final_logit_softcapping"}

_ROWS = (
    Architecture("arcee", "ArceeForCausalLM"),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        **_GPT,
        mlp_output="mlp.dense_4h_to_h",
        attention_output="self_attention.dense",
        refused=(
            Condition("apply_residual_connection_post_layernorm", True, "its residual stream goes through the norms"),
            Condition("slow_but_exact", True, "it multiplies slices of its weights (slow_but_exact)"),
        ),
    ),
    Architecture("cohere", "CohereForCausalLM", logit_multiplier="logit_scale"),
    Architecture("cohere2", "Cohere2ForCausalLM", logit_multiplier="logit_scale"),
    Architecture("cwm", "CwmForCausalLM"),
    Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        experts=_experts("mlp", "shared_experts.down_proj.weight"),
        leading=("first_k_dense_replace",),
        dropped=("num_nextn_predict_layers",),
        unstreamed="its layers have buffers of their own, which are not streamed",
    ),
    Architecture("exaone4", "Exaone4ForCausalLM", **_SANDWICH),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        **_GPT,
        mlp_output="mlp.dense_4h_to_h",
        attention_output="self_attention.dense",
    ),
    Architecture("gemma", "GemmaForCausalLM"),
    Architecture("gemma2", "Gemma2ForCausalLM", **_GEMMA),
    Architecture("gemma3_text", "Gemma3ForCausalLM", **_GEMMA),
    Architecture("glm", "GlmForCausalLM"),
    Architecture("glm4", "Glm4ForCausalLM", mlp_norm="post_mlp_layernorm", attention_norm="post_self_attn_layernorm"),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        **_GPT,
        mlp_output="mlp.c_proj",
        attention_output="attn.c_proj",
        refused=(
            Condition("scale_attn_by_inverse_layer_idx", True, "its attention is scaled by the index of the layer"),
            Condition("add_cross_attention", True, "it has cross-attention to an encoder"),
        ),
    ),
    Architecture(
        "gpt_neo",
        "GPTNeoForCausalLM",
        **_GPT,
        mlp_output="mlp.c_proj",
        attention_output="attn.attention.out_proj",
        run_lengths="attention_types",
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        mlp_output="mlp.dense_4h_to_h",
        attention_output="attention.dense",
        stored=(("lm_head.weight", ("embed_out.weight",)),),
    ),
    Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        experts=Experts("mlp", (("mlp.experts.down_proj", COLUMNS), ("mlp.experts.down_proj_bias", COLUMNS))),
    ),
    Architecture("gptj", "GPTJForCausalLM", **_GPT, mlp_output="mlp.fc_out", attention_output="attn.out_proj"),
    Architecture(
        "granite", "GraniteForCausalLM", residual_multiplier="residual_multiplier", logit_divisor="logits_scaling"
    ),
    Architecture(
        "granite_swa",
        "GraniteSWAForCausalLM",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        experts=Experts(
            "block_sparse_moe",
            (("block_sparse_moe.output_linear.weight|block_sparse_moe.experts.down_proj", ROWS),),
            (
                ("block_sparse_moe.experts.gate_up_proj", ("block_sparse_moe.input_linear.weight",)),
                ("block_sparse_moe.experts.down_proj", ("block_sparse_moe.output_linear.weight",)),
                ("block_sparse_moe.router.weight", ("block_sparse_moe.router.layer.weight",)),
            ),
        ),
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    Architecture("helium", "HeliumForCausalLM"),
    Architecture("jais2", "Jais2ForCausalLM"),
    Architecture("llama", "LlamaForCausalLM"),
    Architecture("mellum", "MellumForCausalLM", experts=_EXPERTS, dropped=("num_mtp_layers",)),
    Architecture("ministral", "MinistralForCausalLM"),
    Architecture("ministral3", "Ministral3ForCausalLM"),
    Architecture("mistral", "MistralForCausalLM"),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        experts=Experts(
            "block_sparse_moe|mlp",
            (("block_sparse_moe.experts.*.w2.weight|mlp.experts.down_proj", ROWS),),
            (
                (
                    "mlp.experts.gate_up_proj",
                    ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
                ),
                ("mlp.experts.down_proj", ("block_sparse_moe.experts.*.w2.weight",)),
                ("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
            ),
        ),
    ),
    Architecture(
        "mpt",
        "MptForCausalLM",
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        mlp_output="ffn.down_proj",
        attention_output="attn.out_proj",
    ),
    Architecture("nanochat", "NanoChatForCausalLM", mlp_output="mlp.fc2", logit_cap="final_logit_softcapping"),
    Architecture("nemotron", "NemotronForCausalLM"),
    Architecture("olmo", "OlmoForCausalLM"),
    Architecture("olmo2", "Olmo2ForCausalLM", **_SANDWICH),
    Architecture("olmo3", "Olmo3ForCausalLM", **_SANDWICH),
    Architecture("olmoe", "OlmoeForCausalLM", experts=_EXPERTS),
    Architecture(
        "opt",
        "OPTForCausalLM",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        after_norm="model.decoder.project_out",
        mlp_output="fc2",
        attention_output="self_attn.out_proj",
        uncorrected=(Condition("do_layer_norm_before", False, "a norm stands behind every addition to the stream"),),
    ),
    Architecture(
        "phi",
        "PhiForCausalLM",
        final_norm="model.final_layernorm",
        mlp_output="mlp.fc2",
        attention_output="self_attn.dense",
    ),
    Architecture("phi3", "Phi3ForCausalLM"),
    Architecture("qwen2", "Qwen2ForCausalLM"),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        experts=_experts("mlp", "shared_expert.down_proj.weight"),
        leading=("max_window_layers",),
        sparse=True,
    ),
    Architecture("qwen3", "Qwen3ForCausalLM"),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", experts=_EXPERTS, sparse=True),
    Architecture("seed_oss", "SeedOssForCausalLM"),
    Architecture("smollm3", "SmolLM3ForCausalLM"),
    Architecture("stablelm", "StableLmForCausalLM"),
    Architecture("starcoder2", "Starcoder2ForCausalLM", mlp_output="mlp.c_proj"),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
SUPPORTED = tuple(sorted(ARCHITECTURES))

# Where a config.json says it, in the words of its family.
_SYNONYMS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
# Lists that can be as long as the layers without having an entry for each: token ids, and indices of layers.
_NOT_PER_LAYER = ("token_id", "token_ids", "tokens", "words_ids", "mlp_only_layers")

# Known, and refused: what in them depends on which layers there are.
_STATE = "some of its layers keep a recurrent state instead of attending, in a pattern that removing layers would break"
_SHARED = "its layers share weights or keys and values with each other"
_CROSS = "some of its layers attend to an image"
_PRODUCERS = "its layers share keys and values, and each adds an embedding of its own to the stream"
_INDEXED = "its layers choose what to attend to by an index, and what that means to a layer removed is not known"
_REFUSED = {
    "bamba": _STATE,
    "bailing_hybrid": _STATE,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": _INDEXED,
    "falcon_h1": _STATE,
    "falcon_mamba": "it has no attention layers, and its layers are not known to be safe to remove",
    "gemma3n": "its layers share keys and values, and its embedding table has a part for each layer",
    "gemma3n_text": "its layers share keys and values, and its embedding table has a part for each layer",
    "gemma4": _PRODUCERS,
    "gemma4_text": _PRODUCERS,
    "gemma4_unified": _PRODUCERS,
    "gemma4_unified_text": _PRODUCERS,
    "glm_moe_dsa": _INDEXED,
    "granitemoehybrid": _STATE,
    "jamba": "its attention and expert layers follow a period in the depth (attn_layer_period), which removing layers "
    "would shift",
    "kimi_linear": _STATE,
    "lfm2": _STATE,
    "lfm2_moe": _STATE,
    "lfm3": _STATE,
    "llama4": "its attention and expert layers follow a pattern in the depth that is not renumbered yet",
    "llama4_text": "its attention and expert layers follow a pattern in the depth that is not renumbered yet",
    "longcat_flash": "each of its layers has two attentions and two places in the cache",
    "minimax": _STATE,
    "mllama": _CROSS,
    "mllama_text_model": _CROSS,
    "nemotron_h": _STATE,
    "olmo_hybrid": _STATE,
    "qwen3_5": _STATE,
    "qwen3_5_moe": _STATE,
    "qwen3_5_moe_text": _STATE,
    "qwen3_5_text": _STATE,
    "qwen3_next": _STATE,
    "qwen4_exp": _STATE,
    "qwen4_exp_text": _STATE,
    "recurrent_gemma": _STATE,
    "zamba": _SHARED,
    "zamba2": _SHARED,
    "zaya": _STATE,
}
_ENCODERS = {
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "deberta-v2",
    "electra",
    "albert",
    "xlm-roberta",
    "modernbert",
}
_ENCODER_DECODERS = {"t5", "mt5", "bart", "mbart", "pegasus", "marian", "whisper", "umt5"}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row for a config.json.

    Raises:
        RemoteCodeRefused: the repository brings its own model class.
        UnsupportedArchitecture: any other type that has no row, with the reason where it is known.
    """
    model_type = str(config.get("model_type") or "unknown")
    row = ARCHITECTURES.get(model_type)
    if _needs_own_code(config, row):
        raise RemoteCodeRefused(
            f"This repository brings its own code for model type {model_type!r}, which is never executed.",
            hint=f"Use a model of a type built into transformers: {', '.join(SUPPORTED)}.",
        )
    if row is None:
        if model_type in _ENCODERS:
            reason = "it is an encoder, not a causal language model"
        elif model_type in _ENCODER_DECODERS or config.get("is_encoder_decoder"):
            reason = "it is an encoder-decoder, not a causal language model"
        else:
            reason = _REFUSED.get(model_type, "its layers are not known to be safe to remove")
        raise UnsupportedArchitecture(model_type, reason, SUPPORTED)
    declared = config.get("architectures") or [row.causal_lm]
    if row.causal_lm not in declared:
        raise UnsupportedArchitecture(
            model_type, f"the checkpoint is a {declared[0]}, not a {row.causal_lm}", SUPPORTED
        )
    if not has_5():
        _check_generation(model_type, config)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "method unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedArchitecture(
            model_type, f"the checkpoint is quantised ({method}); its full-precision original can be", SUPPORTED
        )
    for condition in row.refused:
        if condition.holds(config):
            raise UnsupportedArchitecture(model_type, condition.reason, SUPPORTED)
    if (dimension(config, "num_hidden_layers") or 0) < 2:
        raise UnsupportedArchitecture(model_type, "it has fewer than two layers", SUPPORTED)
    return row


def _check_generation(model_type: str, config: dict[str, Any]) -> None:
    """Raises UnsupportedArchitecture: transformers 4.57 cannot read it."""
    advice = f"transformers 5 can; {installed()} is installed"
    if model_type in ONLY_5:
        raise UnsupportedArchitecture(model_type, f"transformers 4.57 does not know them, {advice}", SUPPORTED)
    try:
        both_read_config(config)
    except NotInBothForms as error:
        raise UnsupportedArchitecture(model_type, f"{error}, which 4.57 cannot read; {advice}", SUPPORTED) from None


def _needs_own_code(config: dict[str, Any], row: Architecture | None) -> bool:
    """Whether `auto_map` names a model class that transformers does not have built in. Some repositories (Phi-3) still
    carry the code of a class that has long been part of transformers; that code is ignored."""
    auto_map = config.get("auto_map")
    if not auto_map:
        return False
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return row is None or not isinstance(named, str) or named.rpartition(".")[2] != row.causal_lm


def dimension(config: Mapping[str, Any], name: str) -> int | None:
    """A size in a config.json by transformers' usual name for it (num_hidden_layers, hidden_size, num_attention_heads,
    max_position_embeddings), whatever the family calls it; None if it is not there."""
    for synonym in _SYNONYMS[name]:
        value = config.get(synonym)
        if isinstance(value, int):
            return value
    return None


def correction_skipped(architecture: Architecture, config: Any) -> str | None:
    """Why stage 2 cannot correct a model of this type, or None. `config`: a config.json or a transformers config."""
    return next((condition.reason for condition in architecture.uncorrected if condition.holds(config)), None)


def sliced_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a transformers config for the layers `kept` (original indices, ascending).

    Every list with one entry per layer is sliced, so that a layer keeps its own kind of attention or MLP, and what
    speaks of layers by their index is renumbered. Qwen2/3 derive `layer_types` from the layer index when it is absent;
    transformers 4.57 has already materialised it, and writing it out keeps a later reader from deriving it anew.
    """
    layer_count = config.num_hidden_layers
    row = ARCHITECTURES.get(config.model_type)
    result = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layer_count and not name.endswith(_NOT_PER_LAYER):
            setattr(result, name, [value[index] for index in kept])
    if row is not None:
        _renumber(row, config, result, kept)
    result.num_hidden_layers = len(kept)
    return result


def _renumber(row: Architecture, config: Any, result: Any, kept: Sequence[int]) -> None:
    for name in row.leading:
        if isinstance(getattr(config, name, None), int):
            setattr(result, name, sum(index < getattr(config, name) for index in kept))
    if row.sparse:
        # Which layers are sparse, by transformers' rule, is written out: no step means the same for the layers kept.
        step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
        result.decoder_sparse_step = 1
        result.mlp_only_layers = [
            position for position, index in enumerate(kept) if index in dense or (index + 1) % step != 0
        ]
    if row.run_lengths is not None:
        setattr(result, row.run_lengths, [[[kind], 1] for kind in result.attention_layers])
    for name in row.dropped:
        if getattr(config, name, None):
            setattr(result, name, 0)
