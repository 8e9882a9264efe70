"""Transformers 4.57 and 5, and the form of a checkpoint's JSON files that both read as the same model.

That form is the one of transformers 4: 5 reads it, being what lies on the Hub, while 4.57 takes no notice of what 5
writes (`rope_parameters`: the defaults would be used) or stumbles over it (`TokenizersBackend`). What is found to be
read differently is in here; tests/models/test_transformers_compat.py and test_families.py look for it with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

# Model types that transformers has from version 5 on. Their configs stay as 5 writes them.
ONLY_5 = frozenset({"cwm", "granite_swa", "jais2", "mellum", "ministral3", "nanochat"})

# Per model type: what 5 calls a field, and 4.57. Only where 4.57 does not know the former.
_RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
_THETA = {"gpt_neox": "rotary_emb_base"}
# The model types that rotate a part of each head, and where 4.57 looks for how much.
_PARTIAL = {
    "gpt_neox": "rotary_pct",
    **dict.fromkeys(("glm", "glm4", "nemotron", "phi", "phi3", "stablelm"), "partial_rotary_factor"),
}
# Where 4.57 has two rotary embeddings, that of the sliding layers without scaling: the field of its base.
_LOCAL_THETA = {"gemma3_text": "rope_local_base_freq", "olmo3": "rope_theta"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_TOKENIZER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


class NotInBothForms(ValueError):
    """Something that only transformers 5 can express; the message says what."""


def installed() -> str:
    """The version of transformers that is installed."""
    return version("transformers")


def has_5() -> bool:
    return int(installed().partition(".")[0]) >= 5


def both_read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json so that either generation reads the same model from it.

    Raises:
        NotInBothForms: 4.57 has no words for it.
    """
    kind = str(config.get("model_type"))
    result = dict(config)
    if kind in ONLY_5:
        return result
    for new, old in _RENAMED.get(kind, {}).items():
        if new in result and old not in result:
            result[old] = result.pop(new)
    parameters = result.pop("rope_parameters", None)
    if parameters and (kind == "olmo3" or not result.get("rope_scaling")):  # which 5 would prefer
        result |= _rope(kind, parameters)
    if kind == "olmo3" and "rope_theta" in result:
        result["rope_parameters"] = _olmo3_rope(result)
    return result


def needs_5(config: Mapping[str, Any]) -> bool:
    """Whether transformers 4.57 reads another model from this config.json than 5, or none."""
    if config.get("model_type") in ONLY_5:
        return True
    try:
        return "rope_parameters" in config and both_read_config(config) != config
    except NotInBothForms:
        return True


def _rope(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of 4.57 for `rope_parameters`, which are flat or by kind of layer."""
    if not parameters:
        return {}
    if not all(isinstance(value, Mapping) for value in parameters.values()):
        return _flat_rope(kind, parameters)
    full, sliding = parameters.get(_FULL), parameters.get(_SLIDING)
    if full is not None and all(value == full for value in parameters.values()) and kind not in _LOCAL_THETA:
        return _flat_rope(kind, full)
    if kind not in _LOCAL_THETA or full is None or sliding is None or _scaling(sliding):
        raise NotInBothForms("its rotary embedding differs between its layers in a way of transformers 5")
    result = _flat_rope(kind, full)
    local = {_LOCAL_THETA[kind]: sliding["rope_theta"]}
    if local.items() <= result.items() or not local.keys() & result.keys():
        return result | local
    raise NotInBothForms("the base of its rotary embedding differs between its layers")


def _olmo3_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """5 (5.23.0) reads the base of the full layers only from a config in the words of 4; here are its own too."""
    base = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    return {_FULL: base | (config.get("rope_scaling") or {}), _SLIDING: base}


def _flat_rope(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"rope_scaling": _scaling(parameters)}
    if "rope_theta" in parameters:
        result[_THETA.get(kind, "rope_theta")] = parameters["rope_theta"]
    part = parameters.get("partial_rotary_factor")
    if part is not None and kind in _PARTIAL:
        result[_PARTIAL[kind]] = part
    elif part not in (None, 1.0):
        raise NotInBothForms("only a part of each head is rotated, which is new to its family in transformers 5")
    if result["rope_scaling"] and result["rope_scaling"]["rope_type"] == "longrope":
        result["rope_scaling"] = _longrope(kind, result["rope_scaling"])
    return result


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """What 4.57 calls rope_scaling."""
    rest = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kind = rest.pop("type", "default")
    rest.setdefault("rope_type", kind)
    return None if rest["rope_type"] == "default" else rest


def _longrope(kind: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's, which 4.57 wants to have these three entries and no other; the lengths are fields of the config."""
    if kind != "phi3" or "attention_factor" in scaling:
        raise NotInBothForms("its rotary scaling of type 'longrope' is written in a way of transformers 5")
    return {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}


def both_read_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json so that either generation reads the same tokenizer from it."""
    result = dict(config)
    name = result.get("tokenizer_class")
    if name in _TOKENIZER_CLASS:
        result["tokenizer_class"] = _TOKENIZER_CLASS[name]
        # Only the generic class has no names of its own, and 4.57 would add token_type_ids, which models refuse.
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):  # for 4.57 a mapping of names
        del result["extra_special_tokens"]
        if extra:
            result.setdefault("additional_special_tokens", extra)
    return result
