"""Which model types can lose decoder layers, and where their parts sit.

Data, not code: a family is a row. What is not known to be safe is refused by name, on the evidence of
config.json alone, before any weight is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import RemoteCodeRefused, UnsupportedArchitecture


@dataclass(frozen=True)
class Architecture:
    """Module paths relative to the causal-LM model (`layers`, `final_norm`) or to one decoder layer (`mlp_output`).

    `mlp_output` is a bias-free or biased `nn.Linear` (d_ff -> d) whose output is added to the residual stream
    without a norm in between: only then is folding into its weight exact.
    """

    model_type: str
    causal_lm: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    mlp_output: str = "mlp.down_proj"
    attention_output: str = "self_attn.o_proj"


_ROWS = (
    Architecture("gemma", "GemmaForCausalLM"),
    Architecture("llama", "LlamaForCausalLM"),
    Architecture("mistral", "MistralForCausalLM"),
    Architecture("phi3", "Phi3ForCausalLM"),
    Architecture("qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "Qwen3ForCausalLM"),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
SUPPORTED = tuple(sorted(ARCHITECTURES))

# Config fields with one entry per layer. Named, because other lists can have the same length (eos_token_id).
_PER_LAYER = ("layer_types",)

_NORM_AFTER_MLP = {"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4", "flex_olmo"}
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
        elif model_type in _NORM_AFTER_MLP:
            reason = "a norm stands between the MLP and the residual stream, where the fold is not exact"
        else:
            reason = "its layers are not known to be safe to remove"
        raise UnsupportedArchitecture(model_type, reason, SUPPORTED)
    declared = config.get("architectures") or [row.causal_lm]
    if row.causal_lm not in declared:
        raise UnsupportedArchitecture(
            model_type, f"the checkpoint is a {declared[0]}, not a {row.causal_lm}", SUPPORTED
        )
    if "rope_parameters" in config and "rope_theta" not in config:
        # transformers 4.57 would silently fall back to its default rope_theta.
        raise UnsupportedArchitecture(
            model_type,
            "its config was saved by transformers 5 (rope_parameters), which 4.57 reads wrongly",
            SUPPORTED,
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "method unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedArchitecture(
            model_type, f"the checkpoint is quantised ({method}); its full-precision original can be", SUPPORTED
        )
    if int(config.get("num_hidden_layers") or 0) < 2:
        raise UnsupportedArchitecture(model_type, "it has fewer than two layers", SUPPORTED)
    return row


def _needs_own_code(config: dict[str, Any], row: Architecture | None) -> bool:
    """Whether `auto_map` names a model class that transformers does not have built in. Some repositories (Phi-3) still
    carry the code of a class that has long been part of transformers; that code is ignored."""
    auto_map = config.get("auto_map")
    if not auto_map:
        return False
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return row is None or not isinstance(named, str) or named.rpartition(".")[2] != row.causal_lm


def sliced_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a transformers config for the layers `kept` (original indices, ascending).

    Every list with one entry per layer is sliced, so that a layer keeps its own attention type. Qwen2/3 derive
    `layer_types` from the layer index when it is absent; transformers 4.57 has already materialised it, and
    writing it out keeps a later reader from deriving it anew.
    """
    layer_count = config.num_hidden_layers
    result = copy.deepcopy(config)
    for name in _PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, list) and len(value) == layer_count:
            setattr(result, name, [value[index] for index in kept])
    result.num_hidden_layers = len(kept)
    return result
