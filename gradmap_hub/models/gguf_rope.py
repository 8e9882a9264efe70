"""The rotary scaling of a GGUF file, as `rope_scaling` of transformers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradmap_hub.models.gguf_header import GgufHeader

# The factors of Llama 3.1, a tensor instead of a metadata key.
FACTORS = "rope_freqs.weight"
# The low and high frequency factors of Llama 3.1 and all later models with its scaling.
_LOW, _HIGH = 1.0, 4.0
# float32 rounding of the stored factors.
_TOLERANCE = 1e-4


def stated_scaling(header: GgufHeader) -> dict[str, Any] | None:
    """`rope_scaling` from the metadata, None if there is no scaling; llama.cpp's default type is linear.

    Raises:
        SourceError: the scaling has another type than linear.
    """
    prefix = f"{header.architecture}.rope"
    kind = header.text(f"{prefix}.scaling.type", "linear")
    key = f"{prefix}.scaling.factor" if f"{prefix}.scaling.factor" in header.metadata else f"{prefix}.scale_linear"
    factor = header.number(key, 0.0, 1e6, 1.0)  # 0: none
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind != "linear" or factor < 1:
        raise header.not_known(f"{prefix}.scaling.type {kind[:40]!r} with the factor {factor:g}")
    return {"rope_type": "linear", "factor": factor}


def llama3_scaling(header: GgufHeader, config: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    """`rope_scaling` of Llama 3.1, from the `factors` that divide the rotary frequencies. `config`: see `gguf._config`.

    Raises:
        SourceError: the factors are not those of this scaling.
    """
    head = config["head_dim"]
    lengths = [2 * math.pi * config["rope_theta"] ** (2 * index / head) for index in range(head // 2)]
    unknown = header.not_known(f"the tensor {FACTORS} with these factors")
    if len(factors) != len(lengths) or config["rope_scaling"] is not None:
        raise unknown
    factor = max(factors)
    if not (all(math.isfinite(value) and value >= 1 - _TOLERANCE for value in factors) and factor > 1):
        raise unknown
    original = _original_context(factors, lengths, factor)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }
    expected = [_llama3_factor(length, factor, original) for length in lengths]
    if any(abs(a / b - 1) > _TOLERANCE for a, b in zip(factors, expected, strict=True)):
        raise unknown
    return scaling


def _original_context(factors: Sequence[float], lengths: Sequence[float], factor: float) -> int:
    """The context length before scaling, from the factors between 1 and the largest; 8192 if there are none."""
    between = [
        length * (_LOW + (_HIGH - _LOW) * (1 / value - 1 / factor) / (1 - 1 / factor))
        for value, length in zip(factors, lengths, strict=True)
        if 1 + _TOLERANCE < value < factor * (1 - _TOLERANCE)
    ]
    return round(statistics.median(between)) if between else 8192


def _llama3_factor(length: float, factor: float, original: int) -> float:
    """The factor by which Llama 3.1 divides a rotary frequency of this wavelength."""
    if length < original / _HIGH:
        return 1.0
    if length > original / _LOW:
        return factor
    smooth = (original / length - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
