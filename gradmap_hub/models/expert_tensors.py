"""Tensors of the model that a checkpoint splits or names differently: transformers 5 holds the weights of all experts
in one tensor (experts, outputs, inputs), while checkpoints have one tensor per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmap_hub.models.architectures import Architecture

# One row of names per expert, concatenated along the outputs; a single row with a single name for a renamed tensor.
Parts = tuple[tuple[str, ...], ...]
Shape = tuple[int, ...]


def parts_of(architecture: Architecture, name: str, experts: int) -> Parts | None:
    """The names in a checkpoint for the model's tensor `name`; None if it has the same name there. `experts`: size of
    its first dimension."""
    prefix, inner, stored = "", name, architecture.stored
    if name.startswith(f"{architecture.layers}."):
        number, _, inner = name.removeprefix(f"{architecture.layers}.").partition(".")
        prefix = f"{architecture.layers}.{number}."
        stored = () if architecture.experts is None else architecture.experts.stored
    patterns = dict(stored).get(inner)
    if patterns is None:
        return None
    rows = range(experts) if "*" in patterns[0] else (0,)
    return tuple(tuple(prefix + pattern.replace("*", str(row)) for pattern in patterns) for row in rows)


def flat(parts: Parts) -> list[str]:
    return [name for row in parts for name in row]


def whole(values: Sequence[Sequence[Tensor]]) -> Tensor:
    """The tensor (experts, outputs, inputs) that the parts form; a single part is returned as it is."""
    if len(values) == len(values[0]) == 1:
        return values[0][0]
    return torch.stack([torch.cat(list(row)) for row in values])


def whole_shape(shapes: Sequence[Sequence[Shape]]) -> Shape:
    if len(shapes) == len(shapes[0]) == 1:
        return shapes[0][0]
    return len(shapes), sum(shape[0] for shape in shapes[0]), *shapes[0][0][1:]


def split(value: Tensor, shapes: Sequence[Sequence[Shape]]) -> list[list[Tensor]]:
    """The inverse of `whole`: the parts of `value`, in the given shapes."""
    if len(shapes) == len(shapes[0]) == 1:
        return [[value]]
    return [list(one.split([shape[0] for shape in row])) for one, row in zip(value, shapes, strict=True)]
