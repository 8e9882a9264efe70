"""Whether a config.json describes a model that can be pruned. Everything else is refused, with the reason, before any
weight is downloaded."""

from __future__ import annotations

from typing import Any

from gradmap_hub.errors import RemoteCodeRefused, UnsupportedArchitecture
from gradmap_hub.files import shown
from gradmap_hub.models.architectures import ARCHITECTURES, SUPPORTED, Architecture, dimension
from gradmap_hub.models.transformers_compat import ONLY_5, NotInBothForms, both_read_config, has_5, installed

# Known types that are refused, because something in them depends on which layers exist.
_STATE = "some of its layers keep a recurrent state instead of attending, in a pattern that removing layers would break"
_SHARED = "its layers share weights or keys and values with each other"
_CROSS = "some of its layers attend to an image"
_PRODUCERS = "its layers share keys and values, and each adds an embedding of its own to the stream"
_INDEXED = "its layers select the tokens to attend to with an indexer, and how removing a layer affects it is not known"
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
    "jamba": "its attention and expert layers follow a period in depth (attn_layer_period), which removing layers "
    "would shift",
    "kimi_linear": _STATE,
    "lfm2": _STATE,
    "lfm2_moe": _STATE,
    "lfm3": _STATE,
    "llama4": "its attention and expert layers follow a pattern in depth that is not supported yet",
    "llama4_text": "its attention and expert layers follow a pattern in depth that is not supported yet",
    "longcat_flash": "each of its layers has two attention modules and two entries in the KV cache",
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
# Fields that describe quantised weights: of transformers, of compressed-tensors in its first form, of MLX.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
_ENCODER_DECODERS = {"t5", "mt5", "bart", "mbart", "pegasus", "marian", "whisper", "umt5"}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row of ARCHITECTURES for a config.json.

    Raises:
        RemoteCodeRefused: the repository has its own model class.
        UnsupportedArchitecture: the type has no row, or the checkpoint or the installed transformers rules it out.
    """
    model_type = str(config.get("model_type") or "unknown")
    row = ARCHITECTURES.get(model_type)
    if _needs_own_code(config, row):
        raise RemoteCodeRefused(
            f"This repository has its own code for model type {model_type!r}, which is never executed.",
            hint=f"Use a model of a type built into transformers: {', '.join(SUPPORTED)}.",
        )
    if row is None:
        if model_type in _ENCODERS:
            reason = "it is an encoder, not a causal language model"
        elif model_type in _ENCODER_DECODERS or config.get("is_encoder_decoder"):
            reason = "it is an encoder-decoder, not a causal language model"
        else:
            reason = _REFUSED.get(model_type, "its layers are not known to be safe to remove")
            inner = config.get("text_config")
            if isinstance(inner, dict) and model_type not in _REFUSED:
                kind = _printable(inner.get("model_type") or "unknown")
                reason = f"it is a multimodal model around a text model of type {kind}; save the text model alone"
        raise UnsupportedArchitecture(model_type, reason, SUPPORTED)
    declared = config.get("architectures") or [row.causal_lm]
    if row.causal_lm not in declared:
        raise UnsupportedArchitecture(
            model_type, f"the checkpoint is a {_printable(declared[0])}, not a {row.causal_lm}", SUPPORTED
        )
    if not has_5():
        _check_generation(model_type, config)
    for field in _QUANTIZED:
        if settings := config.get(field):
            method = settings.get("quant_method", "method unknown") if isinstance(settings, dict) else settings
            raise UnsupportedArchitecture(
                model_type, f"the checkpoint is quantised ({_printable(method)}); use its full-precision original",
                SUPPORTED,
            )  # fmt: skip
    for condition in row.refused:
        if condition.holds(config):
            raise UnsupportedArchitecture(model_type, condition.reason, SUPPORTED)
    if (dimension(config, "num_hidden_layers") or 0) < 2:
        raise UnsupportedArchitecture(model_type, "it has fewer than two layers", SUPPORTED)
    return row


def _printable(value: Any) -> str:
    """A name in an untrusted config.json, printable."""
    return shown(value).strip('"')


def _check_generation(model_type: str, config: dict[str, Any]) -> None:
    """Raises UnsupportedArchitecture: transformers 4.57 cannot read the config."""
    advice = f"transformers 5 can read it ({installed()} is installed)"
    if model_type in ONLY_5:
        raise UnsupportedArchitecture(model_type, f"transformers 4.57 does not have this type; {advice}", SUPPORTED)
    try:
        both_read_config(config)
    except NotInBothForms as error:
        raise UnsupportedArchitecture(model_type, f"{error}, which 4.57 cannot read; {advice}", SUPPORTED) from None


def _needs_own_code(config: dict[str, Any], row: Architecture | None) -> bool:
    """Whether `auto_map` names a model class that transformers does not have built in. Some repositories (Phi-3) still
    contain the code of a class that is now part of transformers; that code is ignored."""
    auto_map = config.get("auto_map")
    if not auto_map:
        return False
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return row is None or not isinstance(named, str) or named.rpartition(".")[2] != row.causal_lm
