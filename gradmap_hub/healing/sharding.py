"""Gathers parameters that FSDP shards over the processes, and shards them again."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """The full tensor of `value`, which FSDP may have sharded. If it is sharded, all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's shard of `value` if `parameter` is sharded and has the same shape, else `value` itself."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy the full tensor `value` into a parameter that may be sharded."""
    parameter.copy_(shard_like(parameter, value))
