"""Translates a checkpoint's JSON files to the form that transformers 4.57 and 5 both read as the same model.

This form is that of transformers 4, which most checkpoints on the Hub have and 5 reads. 4.57 ignores some of what 5
writes (`rope_parameters`: it would use the defaults) and fails on other parts (`TokenizersBackend`). This module holds
all known differences; tests/models/test_transformers_compat.py and test_families.py look for them in both versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from gradmap_hub.models.architectures import ARCHITECTURES, Architecture

# Model types that transformers has from version 5 on. Their configs stay as 5 writes them.
ONLY_5 = frozenset(row.model_type for row in ARCHITECTURES.values() if row.only_5)
_UNKNOWN = Architecture("", "")
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
    """A config.json from which 4.57 and 5 read the same model.

    Raises:
        NotInBothForms: 4.57 cannot express it.
    """
    kind = str(config.get("model_type"))
    result = dict(config)
    if kind in ONLY_5:
        return result
    for new, old in ARCHITECTURES.get(kind, _UNKNOWN).renamed:
        if new in result and old not in result:
            result[old] = result.pop(new)
    parameters = result.pop("rope_parameters", None)
    if parameters and (kind == "olmo3" or not result.get("rope_scaling")):  # 5 prefers rope_scaling
        result |= _rope(kind, parameters)
    if kind == "olmo3" and "rope_theta" in result:
        result["rope_parameters"] = _olmo3_rope(result)
    return result


def needs_5(config: Mapping[str, Any]) -> bool:
    """Whether transformers 4.57 cannot read this config.json, or reads a different model from it than 5."""
    if config.get("model_type") in ONLY_5:
        return True
    try:
        return "rope_parameters" in config and both_read_config(config) != config
    except NotInBothForms:
        return True


def _rope(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of 4.57 for `rope_parameters`, which are flat or per type of layer."""
    if not parameters:
        return {}
    if not all(isinstance(value, Mapping) for value in parameters.values()):
        return _flat_rope(kind, parameters)
    full, sliding = parameters.get(_FULL), parameters.get(_SLIDING)
    local_theta = ARCHITECTURES.get(kind, _UNKNOWN).local_rope_theta
    if full is not None and all(value == full for value in parameters.values()) and local_theta is None:
        return _flat_rope(kind, full)
    if local_theta is None or full is None or sliding is None or _scaling(sliding):
        raise NotInBothForms("its rotary embedding differs between layers in a form that only transformers 5 has")
    result = _flat_rope(kind, full)
    local = {local_theta: sliding["rope_theta"]}
    if local.items() <= result.items() or not local.keys() & result.keys():
        return result | local
    raise NotInBothForms("the base of its rotary embedding differs between layers")


def _olmo3_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` in the form of 5: from the fields of 4 alone, 5.23.0 reads only the base of the full layers."""
    base = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    return {_FULL: base | (config.get("rope_scaling") or {}), _SLIDING: base}


def _flat_rope(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    row = ARCHITECTURES.get(kind, _UNKNOWN)
    result: dict[str, Any] = {"rope_scaling": _scaling(parameters)}
    if "rope_theta" in parameters:
        result[row.rope_theta] = parameters["rope_theta"]
    part = parameters.get("partial_rotary_factor")
    if part is not None and row.partial_rotary is not None:
        result[row.partial_rotary] = part
    elif part not in (None, 1.0):
        raise NotInBothForms("only a part of each head is rotated, which its family supports from transformers 5 on")
    if result["rope_scaling"] and result["rope_scaling"]["rope_type"] == "longrope":
        result["rope_scaling"] = _longrope(kind, result["rope_scaling"])
    return result


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The field rope_scaling of 4.57; None if the type is "default"."""
    rest = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kind = rest.pop("type", "default")
    rest.setdefault("rope_type", kind)
    return None if rest["rope_type"] == "default" else rest


def _longrope(kind: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's rope_scaling: 4.57 accepts exactly these three entries; the lengths are fields of the config."""
    if kind != "phi3" or "attention_factor" in scaling:
        raise NotInBothForms("its rotary scaling of type 'longrope' has a form that only transformers 5 has")
    return {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}


def both_read_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json from which 4.57 and 5 read the same tokenizer."""
    result = dict(config)
    name = result.get("tokenizer_class")
    if isinstance(name, str) and name in _TOKENIZER_CLASS:
        result["tokenizer_class"] = _TOKENIZER_CLASS[name]
        # Only the generic class has no input names of its own: 4.57 would add token_type_ids, which models reject.
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.57 expects a mapping of names
        del result["extra_special_tokens"]
        if extra:
            result.setdefault("additional_special_tokens", extra)
    return result
