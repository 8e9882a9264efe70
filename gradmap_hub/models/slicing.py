"""The config of a model without some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from gradmap_hub.models.architectures import ARCHITECTURES, Architecture

# Lists that may be as long as the number of layers but do not have one entry per layer: token ids, layer indices.
_NOT_PER_LAYER = ("token_id", "token_ids", "tokens", "words_ids", "mlp_only_layers")


def sliced_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a transformers config for the layers `kept` (original indices, ascending).

    Lists with one entry per layer are sliced, so that each layer keeps its kind of attention and MLP; fields that name
    layers by index are renumbered. Qwen2/3 derive a missing `layer_types` from the layer index: transformers 4.57 has
    already filled it in, and it is written, so that no reader derives it from the new indices.
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
        # No step describes the kept layers, so the layers that are dense by transformers' rule are listed.
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
