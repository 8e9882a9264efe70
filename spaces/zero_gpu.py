"""ZeroGPU starts only apps that have a function which asks for its GPU. This is it, and nothing here calls it: the
models are small, and both are to be timed on the same processor, which no other Space shares in between.

Imported on ZeroGPU alone; elsewhere there is no package `spaces`.
"""

from __future__ import annotations

import spaces


@spaces.GPU  # pyright: ignore[reportAttributeAccessIssue]
def reserved() -> str:
    """The name of the GPU."""
    import torch

    return torch.cuda.get_device_name()
