"""A model without weights, for the names and shapes of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of a config with all parameters on the meta device and real buffers (rotary frequencies)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """The tensors of the model's checkpoint: its state without weights that are tied to another."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]
