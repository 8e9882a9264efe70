"""Load and save checkpoints with transformers, as safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gradmap_hub.errors import BrokenCheckpointError, GradmapError
from gradmap_hub.files import usual_mode
from gradmap_hub.layout import TOKENIZER_CONFIG
from gradmap_hub.models.safetensors_files import clean_config, copy_tokenizer_config
from gradmap_hub.units import reason_of

SHARD_LIMIT = "5GB"


def save_checkpoint(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and safetensors (sharded above 5 GB, tied weights once) into `folder`.

    Casts the parameters to `dtype` in place. Writes no generation_config.json: `copy_companions` copies the original's.

    Raises:
        GradmapError: safetensors cannot write, for example because the disk is full.
    """
    from transformers import GenerationConfig

    cast_parameters(model, dtype)
    model.config.dtype = dtype
    model.config._name_or_path = ""
    # save_pretrained rejects inconsistent generation settings; the original's file is copied unchanged.
    model.generation_config = GenerationConfig()
    # Files of an earlier save would be loaded, or counted, together with the new ones.
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    try:
        model.save_pretrained(folder, max_shard_size=SHARD_LIMIT, safe_serialization=True)
    except SafetensorError as error:  # not an OSError, although the usual cause is a full disk
        raise GradmapError(f"The checkpoint cannot be written to {folder}: {error}") from error
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        path.chmod(usual_mode())  # safetensors creates them 0600
    clean_config(folder / "config.json")


def copy_companions(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy tokenizer, templates, generation config and legal texts byte for byte, except tokenizer_config.json (see
    `copy_tokenizer_config`)."""
    for name in names:
        if name == TOKENIZER_CONFIG and (source / name).is_file():
            copy_tokenizer_config(source / name, folder / name)
        elif (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A checkpoint as a causal LM in evaluation mode with parameters in `dtype`, and transformers' loading report.

    Raises:
        BrokenCheckpointError: transformers cannot read it, or keys are missing or mismatched. Unexpected keys are not
            an error here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the tensors is returned, and `weight_check` puts it in one line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model, report = loaded
    except MemoryError:
        raise
    except Exception as error:  # of any type: transformers does not validate a folder's content
        raise BrokenCheckpointError(f"The checkpoint in {folder} cannot be loaded: {reason_of(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise BrokenCheckpointError(
                f"The checkpoint in {folder} has {kind.replace('_', ' ')}, such as {sorted(map(str, report[kind]))[0]}."
            )
    return model.eval(), report


def checkpoint_bytes(folder: Path) -> int:
    """Total bytes of the safetensors files directly in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place. Buffers are not cast: rotary frequencies lose precision below float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
