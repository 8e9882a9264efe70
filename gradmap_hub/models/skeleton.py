"""A model without weights, for the names and shapes of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.errors import SourceError
from gradmap_hub.units import reason_of


def transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def described_model(folder: Path, name: str) -> Any:
    """The causal LM of an untrusted config.json, with everything on the meta device. `name`: what error messages call
    the model.

    Raises:
        SourceError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = transformers_config(folder)
        config.to_json_string()
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # of any type: transformers does not validate the values
        raise SourceError(
            f"config.json of {name} does not describe a model that transformers can build: {reason_of(error)}",
            hint="Correct it in config.json, or use another revision of the model.",
        ) from error


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of a config with all parameters on the meta device and real buffers (rotary frequencies)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """The tensors of the model's checkpoint: its state without weights that are tied to another."""
    tied = tied_names(model)
    return [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]


def tied_names(model: Any) -> set[str]:
    """The tensors that a checkpoint need not have, because they are tied to another."""
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
