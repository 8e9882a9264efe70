"""The weights of an original compared with its config, before anything is computed from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.skeleton import described_model, named_tensors, tied_names
from gradmap_hub.models.weight_files import WeightFiles

# Buffers that older versions of transformers stored: masks, positions, rotary frequencies.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|(attn|attention)\.(attention\.)?bias)$")


def check_tensors(folder: Path, architecture: Architecture, name: str) -> list[str]:
    """Compare a checkpoint's tensors with its config, and read them once. `name`: what error messages call the model.

    Returns:
        The tensors that the model does not have, except those known to be unused (buffers, tied weights, layers that
        predict further tokens).

    Raises:
        SourceError: config.json does not describe a model.
        BrokenCheckpointError: a tensor is missing, has a wrong shape or an integer dtype, or contains NaN or infinity.
    """
    model = described_model(folder, name)
    wanted = named_tensors(model)
    files = WeightFiles(folder)
    files.expect(architecture, wanted)
    missing, unexpected, mismatched = files.compare(wanted)
    if missing:
        raise BrokenCheckpointError(
            f"The checkpoint of {name} has no tensor {missing[0]}, which its config.json requires."
        )
    if mismatched:
        first = mismatched[0]
        shape = next(tuple(tensor.shape) for tensor_name, tensor in wanted if tensor_name == first)
        raise BrokenCheckpointError(
            f"The tensor {first} of {name} has shape {files.shape(first)}; its config.json requires {shape}."
        )
    integers = next((name for name, _ in wanted if not files.dtype(name).is_floating_point), None)
    if integers is not None:
        raise BrokenCheckpointError(
            f"The tensor {integers} of {name} is stored as {files.dtype(integers)}, which is not supported.",
            hint="Use the checkpoint in full precision.",
        )
    found = files.first_not_finite(tensor_name for tensor_name, _ in wanted)
    if found is not None:
        raise BrokenCheckpointError(
            f"The tensor {found} of {name} has values that are not finite (NaN or infinity).",
            hint="Fetch the weights again, or use another revision.",
        )
    return _without_place(model, architecture, unexpected)


def _without_place(model: Any, architecture: Architecture, unexpected: list[str]) -> list[str]:
    """Those of the `unexpected` tensors that are not known to be unused."""
    known = {name for name, _ in model.named_buffers()} | tied_names(model)
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    # Layers after the last one predict further tokens; no written checkpoint has them.
    after = f"{architecture.layers}.{model.config.num_hidden_layers}." if architecture.dropped else None
    return [
        name
        for name in unexpected
        if name not in known
        and not _BUFFERS.search(name)
        and not any(pattern.search(name) for pattern in patterns)
        and not (after is not None and name.startswith(after))
    ]
