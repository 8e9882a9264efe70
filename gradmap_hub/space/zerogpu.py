"""Rewrites a Space folder for ZeroGPU and back. A free account may host a ZeroGPU Space; a CPU Space needs a paid plan.

The app is the same and computes on the machine's CPU. ZeroGPU requires another Python version, a supported torch and a
function that requests the GPU (spaces/zero_gpu.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gradmap_hub.comparison import read_comparison
from gradmap_hub.files import write_text
from gradmap_hub.layout import CARD
from gradmap_hub.space.app import PYTHON_VERSION, ZERO_GPU_MODULE, content_folder

CPU, ZERO_GPU = "cpu-basic", "zero-a10g"
# The Hub allows 3.10.13 and 3.12.12, and torch 2.8 to 2.11.
_ZERO_PYTHON, _ZERO_TORCH = "3.12.12", "torch==2.11.0"
# The lines of requirements.txt that only a ZeroGPU Space has.
ZERO_REQUIREMENTS = frozenset({_ZERO_TORCH, "spaces"})
_HARDWARE = re.compile(r"^suggested_hardware:.*\n", re.MULTILINE)
_PYTHON = re.compile(r"^python_version:.*$", re.MULTILINE)
_TORCH = re.compile(r"^torch==.*$", re.MULTILINE)


def is_zero(hardware: str | None) -> bool:
    """Whether a hardware name of the Hub is ZeroGPU's."""
    return hardware is not None and hardware.startswith("zero")


def is_for_zero(folder: Path) -> bool:
    """Whether the app in a Space folder is written for ZeroGPU."""
    found = _HARDWARE.search((folder / CARD).read_text(encoding="utf-8"))
    return found is not None and ZERO_GPU in found[0]


def set_hardware(folder: Path, *, zero: bool) -> None:
    """Rewrite a Space folder for ZeroGPU or for a CPU, unless it is written for it already."""
    if is_for_zero(folder) == zero:
        return
    card = folder / CARD
    text = card.read_text(encoding="utf-8")
    line = f"suggested_hardware: {ZERO_GPU if zero else CPU}\n"
    text = _HARDWARE.sub(line, text, count=1) if _HARDWARE.search(text) else text.replace("---\n", f"---\n{line}", 1)
    text = _PYTHON.sub(f'python_version: "{_ZERO_PYTHON if zero else PYTHON_VERSION}"', text, count=1)
    write_text(card, text)
    requirements = (content_folder() / f"requirements-{_runtime(folder)}.txt").read_text(encoding="utf-8")
    if zero:
        requirements = _TORCH.sub(_ZERO_TORCH, requirements) + "# Hands out the GPU.\nspaces\n"
        shutil.copyfile(content_folder() / ZERO_GPU_MODULE, folder / ZERO_GPU_MODULE)
    else:
        (folder / ZERO_GPU_MODULE).unlink(missing_ok=True)
    write_text(folder / "requirements.txt", requirements)


def _runtime(folder: Path) -> str:
    return "transformers" if read_comparison(folder).runtime == "transformers" else "onnx"
