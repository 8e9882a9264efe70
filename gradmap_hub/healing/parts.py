"""Which weights are trained: all layers, those around the gaps, or low-rank adapters that are merged afterwards.

The embedding, the LM head and the final norm are never trained. In small models the first two are usually tied, and
are the largest matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradmap_hub.errors import MissingExtra
from gradmap_hub.healing.sharding import whole
from gradmap_hub.models.architectures import Architecture

# Part "gaps": trained layers after each gap, and at the end of the model.
BEHIND, LAST = 2, 3
# Rank and alpha of the LoRA adapters.
RANK, ALPHA = 32, 64
# Bytes per trained weight: value, gradient and the two moments of AdamW in float32.
TRAINED_BYTES = 16
# Share of the free memory that training may plan to use; the rest is for activations.
SHARE = 0.6


@dataclass(frozen=True)
class Part:
    """Which weights are trained. `name`: "all", "gaps" or "lora"; `layers`: the trained layers, as indices in the
    student."""

    name: str
    layers: list[int]


def layers_around_gaps(kept: Sequence[int], removed: Sequence[int]) -> list[int]:
    """The layers of part "gaps": the last kept layer before each gap, the first BEHIND kept layers after it, and the
    last LAST kept layers. All indices are original ones; `kept` is ascending, as is the result."""
    found: set[int] = set(kept[-LAST:])
    for layer in removed:
        found.update([other for other in kept if other < layer][-1:])
        found.update([other for other in kept if other > layer][:BEHIND])
    return sorted(found)


def choose_part(
    wanted: str, kept: Sequence[int], removed: Sequence[int], weights: Mapping[str, int], free: int
) -> Part:
    """The part of that name, or for "auto" the first of "all", "gaps" that fits into SHARE of `free`, else "lora".

    Args:
        wanted: "all", "gaps", "lora" or "auto".
        kept: Original indices of the student's layers, ascending.
        removed: Original indices of the removed layers.
        weights: Number of parameters: "all" layers together, and the "rest" of the model.
        free: Bytes of free memory.
    """
    around = [kept.index(layer) for layer in layers_around_gaps(kept, removed)]
    everything = list(range(len(kept)))
    if wanted == "auto":
        resident = 4 * (weights["all"] + weights["rest"])
        room = SHARE * free - resident
        share = len(around) / len(kept)
        wanted = next(
            (
                name
                for name, trained in (("all", weights["all"]), ("gaps", share * weights["all"]))
                if (TRAINED_BYTES - 4) * trained <= room
            ),
            "lora",
        )
    return Part(wanted, around if wanted == "gaps" else everything)


def free_bytes(device: str) -> int:
    """Bytes of free memory: of the GPU if `device` is "cuda", else of the machine."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def start_training(student: nn.Module, architecture: Architecture, part: Part) -> None:
    """Set `requires_grad` on exactly the weights of `part`. For "lora", adapters are added to all linears of the
    layers, and only these are trained.

    Raises:
        MissingExtra: peft is not installed.
    """
    student.requires_grad_(False)
    if part.name == "lora":
        _add_adapters(student, architecture)
        return
    layers: Any = student.get_submodule(architecture.layers)
    for index in part.layers:
        for parameter in layers[index].parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def trained_values(student: nn.Module, architecture: Architecture, part: Part) -> dict[tuple[int, str], Tensor]:
    """Copies of the trained weights, in full if they are sharded: (index in the student, name within the layer) ->
    value. Adapters are first merged into their linears."""
    layers: Any = student.get_submodule(architecture.layers)
    found: dict[tuple[int, str], Tensor] = {}
    if part.name == "lora":
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
                    module.merge()
                    found[index, f"{name}.weight"] = whole(module.get_base_layer().weight.detach()).clone()
        return found
    for index in part.layers:
        for name, parameter in layers[index].named_parameters():
            found[index, name] = whole(parameter.detach()).to("cpu", copy=True)
    return found


def _add_adapters(student: nn.Module, architecture: Architecture) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("Healing with adapters", "lora") from error
    prefix = f"{architecture.layers}."
    linears = [
        name
        for name, module in student.named_modules()
        if name.startswith(prefix) and type(module).__name__ in ("Linear", "Conv1D")
    ]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=linears)
    inject_adapter_in_model(config, student)
