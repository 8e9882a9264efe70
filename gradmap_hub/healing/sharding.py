"""Parameters of which each process holds a shard (FSDP), in full and back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a shard (FSDP), in full. All processes must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's shard of `value`, if `parameter`, of the same shape, is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value in full into a parameter that may be sharded."""
    parameter.copy_(shard_like(parameter, value))
