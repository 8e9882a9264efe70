"""`make check-gpu`: speed and memory of healing on this machine, for models given by their shapes.

Weights and tokens are random and nothing is downloaded; `make bench-heal` measures the gain of healing. Each shape
loses a quarter of its layers, the original's predictions are cached on disk as in `heal`, and the rest is trained by
the loop of `heal`. Model FLOPs are 6 per trained weight and token, and 4 per frozen weight that gradients pass through;
utilisation is their share of the device's peak in bfloat16 without sparsity.

Writes the section "Training" of docs/benchmarks.md. `--tiny` runs the same code on shapes for a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradmap_hub.data.rows import Rows
from gradmap_hub.healing.corpus import make_corpus
from gradmap_hub.healing.heal import Student, Teacher, heal_model
from gradmap_hub.healing.parts import Part, layers_around_gaps
from gradmap_hub.healing.training import RATE, Recipe
from gradmap_hub.machine import hardware
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pruning.removal import remove_layers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- training -->", "<!-- /training -->"
HELD_OUT = 4
# Dense bfloat16 FLOP/s by the manufacturer's data sheet.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama's config, and how it is trained: `part` as in `healing.parts`, `tokens` in sequences of
    `length` tokens, `per_step` sequences per optimizer step."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    part: str
    tokens: int
    length: int = 512
    per_step: int = 8


SMOL = {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152, "tied": True}
EIGHT = {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "groups": 8, "vocabulary": 128256, "tied": False}
TINY = {"hidden": 64, "inner": 160, "layers": 8, "heads": 4, "groups": 2, "vocabulary": 512, "tied": True}
SHAPES = (
    Shape("135M", **SMOL, part="all", tokens=10_000_000, per_step=32),
    Shape("8B, adapters", **EIGHT, part="lora", tokens=20 * 8 * 512),
    Shape("8B, layers around the gaps", **EIGHT, part="gaps", tokens=20 * 8 * 512),
)
FEW = tuple(
    Shape(f"tiny, {part}", **TINY, part=part, tokens=20 * 4 * 64, length=64, per_step=4)
    for part in ("all", "lora", "gaps")
)


@dataclass(frozen=True)
class Found:
    """The result for a shape. `reading`: tokens per second of the original's predictions; `training`: of training;
    `memory`: peak bytes; `utilisation`: share of the device's peak FLOP/s, None if the peak is unknown."""

    shape: Shape
    reading: float
    training: float
    memory: int
    utilisation: float | None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="shapes for a CPU, to test the code; the numbers are meaningless"
    )
    parser.add_argument("--only", help="measure only shapes whose name contains this")
    parser.add_argument("--tokens", type=int, help="tokens to train on, instead of each shape's own number")
    arguments = parser.parse_args()
    found: list[Found] = []
    for shape in FEW if arguments.tiny else SHAPES:
        if arguments.only is None or arguments.only in shape.name:
            found.append(_measure(shape, arguments.tokens or shape.tokens))
            print(_row(found[-1]), flush=True)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    PAGE.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{_section(found)}{END}{after}", encoding="utf-8")


def _measure(shape: Shape, tokens: int) -> Found:
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    sequences = max(shape.per_step, tokens // shape.length // shape.per_step * shape.per_step)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (sequences + HELD_OUT, shape.length), generator=draw)
    rows = [Rows("random", "", part) for part in (ids[:sequences], ids[sequences:])]
    corpus = make_corpus([(rows[0], 1.0)], [rows[1]], sequences, 0)
    removed = list(range(shape.layers // 2, shape.layers // 2 + shape.layers // 4))
    kept = [layer for layer in range(shape.layers) if layer not in removed]
    architecture = ARCHITECTURES["llama"]
    with tempfile.TemporaryDirectory(prefix="gradmap-") as folder:
        original = Decoder(_model(shape, torch.bfloat16, device), architecture, shape.length)
        teacher = Teacher.of(corpus, Path(folder), shape.vocabulary, "random")
        started = time.monotonic()
        for cache in teacher.parts:
            cache.fill(original)
        reading = ids.numel() / (time.monotonic() - started)
        del original
        model = _model(shape, torch.float32, device)
        remove_layers(model, architecture, removed)
        student = Decoder(model, architecture, shape.length)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        around = [kept.index(layer) for layer in layers_around_gaps(kept, removed)]
        part = Part(shape.part, around if shape.part == "gaps" else list(range(len(kept))))
        recipe = Recipe(RATE, shape.per_step, min(8, shape.per_step), autocast=cuda, save_every=1e9)
        record, _ = heal_model(
            Student(model, student.head, architecture, "random"), corpus, teacher, part, recipe, Path(folder) / "state"
        )
    training = record.tokens / record.seconds
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    embedding = shape.hidden * shape.vocabulary * (1 if shape.tied else 2)
    passed = sum(value.numel() for value in model.parameters()) - embedding
    flops = 6 * trained + 4 * max(0, passed - trained) + 4 * shape.hidden * shape.vocabulary
    peak = next((value for name, value in PEAK.items() if cuda and name in torch.cuda.get_device_name()), None)
    return Found(
        shape, reading, training, torch.cuda.max_memory_allocated() if cuda else _resident(),
        training * flops / peak if peak else None,
    )  # fmt: skip


def _model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _row(found: Found) -> str:
    share = "" if found.utilisation is None else f"{100 * found.utilisation:.0f}%"
    return (
        f"| {found.shape.name} | {found.shape.length * found.shape.per_step:,} | {found.reading:,.0f} | "
        f"{found.training:,.0f} | {found.memory / 2**30:.1f} GiB | {share} |"
    )


def _section(found: list[Found]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{hardware()}, no GPU"
    if all(entry.shape in FEW for entry in found):
        return (
            "## Training\n\nNo GPU has run `make check-gpu` yet, which fills this section with the speed and memory of "
            f"training in the shapes of a 135M and an 8B model. Its code has run with tiny shapes on {device}.\n"
        )
    lines = [
        "## Training",
        "",
        f"Written by `make check-gpu` (`python -m benchmarks.training`) on {device}: random weights in the shapes of "
        "models. Tokens per second of the original's predictions and of training without a quarter of the layers, and "
        "the share of the device's bfloat16 FLOP/s.",
        "",
        "| shape | tokens a step | predictions | training | peak memory | FLOP/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(_row, found), ""])


if __name__ == "__main__":
    main()
