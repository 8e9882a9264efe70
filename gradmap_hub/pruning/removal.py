"""Remove decoder layers from a loaded model, and correct all layer indices and per-layer config fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.slicing import sliced_config

# Attributes in which submodules of a layer hold its index.
_INDICES = ("layer_idx", "layer_id")


def remove_layers(model: nn.Module, architecture: Architecture, removed: Sequence[int]) -> list[int]:
    """Delete the decoder layers `removed` (original indices) in place and return the kept indices, ascending.

    `layer_idx`, which addresses the KV cache, is renumbered on every submodule that has it. The config is replaced by a
    sliced one (see `sliced_config`), also in submodules that refer to it.
    """
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    gone = set(removed)
    kept = [index for index in range(len(layers)) if index not in gone]
    old_config = model.config
    new_config = sliced_config(old_config, kept)
    parent_path, _, name = architecture.layers.rpartition(".")
    setattr(model.get_submodule(parent_path), name, nn.ModuleList(layers[index] for index in kept))
    for position, index in enumerate(kept):
        for module in layers[index].modules():
            for index_name in _INDICES:
                if hasattr(module, index_name):
                    setattr(module, index_name, position)
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = new_config  # pyright: ignore
    return kept


@contextmanager
def layers_left_out(model: nn.Module, architecture: Architecture, removed: Sequence[int]) -> Iterator[None]:
    """Inside this context, the layers `removed` are missing from the model and the KV cache is indexed without them;
    afterwards the model is restored."""
    layers = model.get_submodule(architecture.layers)
    # Indices and configs are plain attributes; modules and parameters are held in attributes with an underscore.
    before = [
        (module, {name: value for name, value in vars(module).items() if not name.startswith("_")})
        for module in model.modules()
    ]
    parent_path, _, name = architecture.layers.rpartition(".")
    try:
        remove_layers(model, architecture, removed)
        yield
    finally:
        setattr(model.get_submodule(parent_path), name, layers)
        for module, attributes in before:
            vars(module).update(attributes)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def storage_dtype(name: str, original: str) -> torch.dtype:
    """The torch dtype of the written weights for the option `name`; "auto" is the `original`'s, such as "bfloat16"."""
    return getattr(torch, original if name == "auto" else name)
