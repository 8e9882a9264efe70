"""ZeroGPU requires an app to have a function that requests its GPU. This one is never called: the models are small, and
both must be timed on a processor that other Spaces do not share.

Imported only on ZeroGPU; the package `spaces` does not exist elsewhere.
"""

from __future__ import annotations

import spaces


@spaces.GPU  # pyright: ignore[reportAttributeAccessIssue]
def reserved() -> str:
    """Return the name of the GPU."""
    import torch

    return torch.cuda.get_device_name()
