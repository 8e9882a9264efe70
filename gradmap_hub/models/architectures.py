"""The model types that can be pruned: the paths of their modules, and what other tools support.

This file holds data: a family is one row. `support` refuses every other type before a weight is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Axis of the residual stream (width d) in a parameter: ROWS for (d, f) as in nn.Linear, COLUMNS for (f, d) and (d,).
ROWS, COLUMNS = -2, -1


@dataclass(frozen=True)
class Condition:
    """A setting of a config (`field` has `value`) and the reason why it excludes something."""

    field: str
    value: Any
    reason: str

    def holds(self, config: Any) -> bool:
        """Whether the setting has this value in `config`, a config.json or a transformers config."""
        found = config.get(self.field) if isinstance(config, Mapping) else getattr(config, self.field, None)
        return found == self.value


@dataclass(frozen=True)
class Experts:
    """A mixture of experts within a layer.

    `block`: path of the module whose output (the first, if it is a tuple) is added to the residual stream. `outputs`:
    fnmatch patterns of the parameters that write this output, with the axis of the residual stream in each. They cover
    all routed and shared experts, because the output is linear in all of them together. In `block` and in the patterns,
    `|` separates the names in transformers 4.57 and 5.

    `stored`: transformers 5 fuses the weights of all experts into one tensor; checkpoints and 4.57 have separate
    tensors for each expert. Pairs of a fused tensor's name within the layer and the names of its parts in the
    checkpoint: `*` stands for the index of the expert; several parts (gate and up) are concatenated along the output
    dimension.
    """

    block: str
    outputs: tuple[tuple[str, int], ...]
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One family. Module paths are relative to the causal LM (`layers`, `final_norm`, `after_norm`) or to one layer.

    Residual stream. `mlp_output` and `attention_output` are linears (nn.Linear, or transformers' transposed Conv1D)
    that write to it, through `mlp_norm` and `attention_norm` if set, times the layer's attribute `residual_multiplier`
    if set. A layer without `mlp_output` has `experts`. `norm_offset` is added to a norm's weight to give its gain.

    Head. `after_norm` is a projection between final norm and head. Logits are multiplied by the config field
    `logit_multiplier`, divided by `logit_divisor` and capped by `logit_cap`, where set.

    Config fields that refer to layers by index, besides lists with one entry per layer. `leading`: fields with the
    number of first layers that are of another kind. `sparse`: the config has `decoder_sparse_step` and
    `mlp_only_layers`. `run_lengths`: the field from which `attention_layers` is built. `dropped`: fields that describe
    weights that no written checkpoint has; they are set to 0.

    Limits. `refused`: settings that cannot be pruned. `uncompensated`: settings that stage 2 skips. `unstreamed`: the
    reason why the type cannot be streamed from disk, or None.

    Names in transformers 5. `only_5`: 4.57 lacks the type. `stored`: tensors outside the layers that a checkpoint names
    differently (see `Experts`). `renamed`: (config field in 5, in 4.57). `rope_theta`, `partial_rotary`: the fields of
    4.57 for the rotary base and for the rotated share of each head (None: 4.57 rotates all of it). `local_rope_theta`:
    where 4.57 has a second, unscaled rotary embedding for the sliding layers, the field of its base.

    Exports. `optimum`: whether the graph of optimum-onnx 0.1 is correct (None: it does not know the type). `genai`:
    whether the model builder of ONNX Runtime GenAI writes a correct graph. `cache_from_graph`: whether
    Optimum's ORTModelForCausalLM creates an empty cache of another shape than its graph takes.
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
    norm_offset: float = 0.0
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
    uncompensated: tuple[Condition, ...] = ()
    unstreamed: str | None = None
    only_5: bool = False
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    rope_theta: str = "rope_theta"
    partial_rotary: str | None = None
    local_rope_theta: str | None = None
    optimum: bool | None = None
    genai: bool = False
    cache_from_graph: bool = False


def _experts(block: str, *shared: str) -> Experts:
    """Experts named as in most families. `shared`: output weights of the shared experts, which every token uses."""
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
# The norms on the outputs of attention and MLP in Gemma 2 and 3, OLMo 2 and 3, EXAONE 4.
_SANDWICH: dict[str, Any] = {"mlp_norm": "post_feedforward_layernorm", "attention_norm": "post_attention_layernorm"}
_GEMMA: dict[str, Any] = {**_SANDWICH, "norm_offset": 1.0, "logit_cap": "final_logit_softcapping"}

_ROWS = (
    Architecture("arcee", "ArceeForCausalLM", optimum=True),
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
        optimum=True,
    ),
    Architecture("cohere", "CohereForCausalLM", logit_multiplier="logit_scale", optimum=True),
    Architecture("cohere2", "Cohere2ForCausalLM", logit_multiplier="logit_scale"),
    Architecture("cwm", "CwmForCausalLM", only_5=True),
    Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        experts=_experts("mlp", "shared_experts.down_proj.weight"),
        leading=("first_k_dense_replace",),
        dropped=("num_nextn_predict_layers",),
        unstreamed="its layers have buffers of their own, which are not streamed",
        # Its graph branches on whether any token is routed to an expert, and the trace fixes the branches of the
        # example input: logits differ by more than 1. Without the branch the graph is correct.
        optimum=False,
    ),
    Architecture("exaone4", "Exaone4ForCausalLM", **_SANDWICH),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        **_GPT,
        mlp_output="mlp.dense_4h_to_h",
        attention_output="self_attention.dense",
        optimum=True,
    ),
    Architecture("gemma", "GemmaForCausalLM", optimum=True, genai=True),
    Architecture("gemma2", "Gemma2ForCausalLM", **_GEMMA, optimum=True, cache_from_graph=True),
    Architecture("gemma3_text", "Gemma3ForCausalLM", **_GEMMA, local_rope_theta="rope_local_base_freq", optimum=True),
    Architecture("glm", "GlmForCausalLM", partial_rotary="partial_rotary_factor", optimum=True),
    Architecture(
        "glm4",
        "Glm4ForCausalLM",
        mlp_norm="post_mlp_layernorm",
        attention_norm="post_self_attn_layernorm",
        partial_rotary="partial_rotary_factor",
    ),
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
        optimum=True,
    ),
    Architecture(
        "gpt_neo",
        "GPTNeoForCausalLM",
        **_GPT,
        mlp_output="mlp.c_proj",
        attention_output="attn.attention.out_proj",
        run_lengths="attention_types",
        optimum=True,
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        mlp_output="mlp.dense_4h_to_h",
        attention_output="attention.dense",
        stored=(("lm_head.weight", ("embed_out.weight",)),),
        rope_theta="rotary_emb_base",
        partial_rotary="rotary_pct",
        optimum=True,
    ),
    Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        experts=Experts("mlp", (("mlp.experts.down_proj", COLUMNS), ("mlp.experts.down_proj_bias", COLUMNS))),
        optimum=True,
    ),
    Architecture(
        "gptj", "GPTJForCausalLM", **_GPT, mlp_output="mlp.fc_out", attention_output="attn.out_proj", optimum=True
    ),
    Architecture(
        "granite",
        "GraniteForCausalLM",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
        optimum=True,
    ),
    Architecture(
        "granite_swa",
        "GraniteSWAForCausalLM",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
        only_5=True,
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
    Architecture("helium", "HeliumForCausalLM", optimum=True),
    Architecture("jais2", "Jais2ForCausalLM", only_5=True),
    Architecture("llama", "LlamaForCausalLM", optimum=True, genai=True),
    Architecture("mellum", "MellumForCausalLM", experts=_EXPERTS, dropped=("num_mtp_layers",), only_5=True),
    Architecture("ministral", "MinistralForCausalLM"),
    Architecture("ministral3", "Ministral3ForCausalLM", only_5=True),
    Architecture("mistral", "MistralForCausalLM", optimum=True, genai=True),
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
        optimum=True,
    ),
    Architecture(
        "nanochat", "NanoChatForCausalLM", mlp_output="mlp.fc2", logit_cap="final_logit_softcapping", only_5=True
    ),
    Architecture("nemotron", "NemotronForCausalLM", partial_rotary="partial_rotary_factor", optimum=True),
    Architecture("olmo", "OlmoForCausalLM", optimum=True),
    Architecture("olmo2", "Olmo2ForCausalLM", **_SANDWICH, optimum=True),
    Architecture("olmo3", "Olmo3ForCausalLM", **_SANDWICH, local_rope_theta="rope_theta"),
    Architecture("olmoe", "OlmoeForCausalLM", experts=_EXPERTS),
    Architecture(
        "opt",
        "OPTForCausalLM",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        after_norm="model.decoder.project_out",
        mlp_output="fc2",
        attention_output="self_attn.out_proj",
        uncompensated=(
            Condition("do_layer_norm_before", False, "a norm follows every addition to the residual stream"),
        ),
        optimum=True,
    ),
    Architecture(
        "phi",
        "PhiForCausalLM",
        final_norm="model.final_layernorm",
        mlp_output="mlp.fc2",
        attention_output="self_attn.dense",
        partial_rotary="partial_rotary_factor",
        optimum=True,
    ),
    Architecture(
        "phi3",
        "Phi3ForCausalLM",
        partial_rotary="partial_rotary_factor",
        optimum=True,
        genai=True,
        cache_from_graph=True,
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", optimum=True, genai=True),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        experts=_experts("mlp", "shared_expert.down_proj.weight"),
        leading=("max_window_layers",),
        sparse=True,
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", optimum=True, genai=True),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        experts=_EXPERTS,
        sparse=True,
        renamed=(("num_local_experts", "num_experts"),),
        optimum=True,
    ),
    Architecture("seed_oss", "SeedOssForCausalLM"),
    Architecture("smollm3", "SmolLM3ForCausalLM", optimum=True),
    Architecture("stablelm", "StableLmForCausalLM", partial_rotary="partial_rotary_factor", optimum=True),
    Architecture("starcoder2", "Starcoder2ForCausalLM", mlp_output="mlp.c_proj"),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
SUPPORTED = tuple(sorted(ARCHITECTURES))

# The names of these sizes in the config.json of each family.
_SYNONYMS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}


def dimension(config: Mapping[str, Any], name: str) -> int | None:
    """A size in a config.json, also if the family has another name for it; None if the config does not state it.
    `name`: num_hidden_layers, hidden_size, num_attention_heads or max_position_embeddings."""
    for synonym in _SYNONYMS[name]:
        value = config.get(synonym)
        if isinstance(value, int):
            return value
    return None


def head_size(config: Mapping[str, Any]) -> int:
    """Width of one attention head from a config.json, derived as transformers does; 0 if it is unknown."""
    stated = config.get("head_dim")
    if isinstance(stated, int):
        return stated
    width, heads = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
    return width // heads if width and heads else 0


def compensation_skipped(architecture: Architecture, config: Any) -> str | None:
    """Why stage 2 cannot compensate a model of this type, or None. `config`: a config.json or a transformers config."""
    return next((condition.reason for condition in architecture.uncompensated if condition.holds(config)), None)
