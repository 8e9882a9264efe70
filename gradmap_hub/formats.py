"""The table of export formats, one row per format; the only place that describes them.

docs/extending.md shows how to add a format: a row, a writer in exporters/ and a test case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Optimum's graph. Every export includes it; the other formats are optional.
ONNX = "onnx"
# Largest size of both models' files together that one browser can hold, in bytes.
BROWSER_BYTES = 1_500_000_000
# The folder of exported files in a model folder.
ONNX_FOLDER = "onnx"


@dataclass(frozen=True)
class Limits:
    """The largest allowed difference between a graph and its checkpoint.

    Attributes:
        perplexity: Largest ratio of the graph's perplexity to the checkpoint's.
        logits: Largest absolute difference of logits; None: no limit.
        greedy: Whether every greedy token must be equal.
    """

    perplexity: float
    logits: float | None = None
    greedy: bool = False


_FLOAT32 = Limits(perplexity=1.001, logits=1e-3, greedy=True)


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: Name in records, `--to` and `--quantize`.
        file: File name in the folder onnx/, as transformers.js expects it. Weights too large for one file are in
            `<file>_data`.
        alias: A further name of the same file: transformers.js has two names for 8-bit weights, "q8" and "int8".
        former: The name that earlier versions gave the file. It is still read.
        title: Title of the export stage in the progress output.
        precision: Precision of the weights; the name in compare.json if `in_space`. Default: `name`.
        artifact: Name in `--artifact`, `generate` and `serve`. Default: `name`.
        base: What the file is made from: Optimum's float32 graph, GenAI's, either (GenAI's if its builder supports the
            model, else Optimum's), or the checkpoint.
        limits: Limits of the check. None: not an ONNX graph; the file is neither checked nor run by the runtime.
        least_share, most_share: Smallest and largest size of the file, as a share of the float32 weights.
        in_space: Whether a comparison Space may run it.
        on_cpu, on_cuda: Rank in the automatic choice for a machine, lowest first; None: only on request.
        may_fail: Whether a run continues without the file if its check fails.
        advice: A sentence shown when the check fails.
    """

    name: str
    file: str
    title: str
    alias: str = ""
    former: str = ""
    precision: str = ""
    artifact: str = ""
    base: Literal["optimum", "genai", "either", "checkpoint"] = "either"
    limits: Limits | None = _FLOAT32
    least_share: float = 1.0
    most_share: float = 1.0
    in_space: bool = False
    on_cpu: int | None = None
    on_cuda: int | None = None
    may_fail: bool = False
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", self.precision or self.name)
        object.__setattr__(self, "artifact", self.artifact or self.name)
        if self.in_space and self.limits is None:
            raise ValueError("A Space runs only ONNX graphs: in_space requires limits.")


# On a CPU, int8 is the fastest format that costs less than 2 % of perplexity; int4 costs a small model more than a user
# expects, so it is last. The kernels for integer weights are for CPUs; a GPU is faster in half precision.
# The least share of a quantised file: 8 (4) bits per weight and a 32-bit scale per 32 weights.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            ONNX, "model.onnx", "Exporting to ONNX, comparing with PyTorch",
            precision="float32", artifact="fp32", base="optimum", in_space=True, on_cpu=2, on_cuda=1,
        ),
        Format(
            "int8", "model_int8.onnx", "Exporting to ONNX with 8-bit weights, comparing with PyTorch",
            alias="model_quantized.onnx",
            limits=Limits(perplexity=1.02), least_share=9 / 32, most_share=0.4, in_space=True, on_cpu=0, on_cuda=2,
            may_fail=True,
        ),
        Format(
            "int4", "model_q4.onnx", "Exporting to ONNX with 4-bit weights, comparing with PyTorch",
            former="model_int4.onnx",
            limits=Limits(perplexity=1.10), least_share=5 / 32, most_share=0.4, in_space=True, on_cpu=3, on_cuda=3,
            may_fail=True, advice="int8 is the better artifact for this model.",
        ),
        Format(
            "genai", "model_genai.onnx", "Exporting GenAI's ONNX graph, comparing with PyTorch",
            precision="float32", base="genai", most_share=1.05, on_cpu=1,
        ),
        Format(
            "fp16", "model_fp16.onnx", "Exporting to ONNX in float16, comparing with PyTorch",
            precision="float16", limits=Limits(perplexity=1.005), least_share=0.5, most_share=0.55, on_cuda=0,
        ),
    )
}  # fmt: skip


def add_row(row: Format) -> None:
    """Add a row to the table. `gradmap_hub.exporters.writers.register` adds a row and its writer.

    Raises:
        ValueError: another format has its name, one of its file names, its artifact name or precision in a Space.
    """
    for other in FORMATS.values():
        both_in_space = row.in_space and other.in_space
        if shared := set(graph_names(row)) & set(graph_names(other)):
            raise ValueError(f"The format {other.name!r} already has the file {min(shared)!r}.")
        for column in ("name", "artifact", *(["precision"] if both_in_space else [])):
            if getattr(row, column) == getattr(other, column):
                raise ValueError(f"The format {other.name!r} already has the {column} {getattr(row, column)!r}.")
    FORMATS[row.name] = row


def quantized() -> list[str]:
    """The names that `--quantize` takes: all formats except Optimum's graph."""
    return [name for name in FORMATS if name != ONNX]


def preferred() -> list[Format]:
    """All formats, in the order of preference on a CPU; those chosen only on request are last."""
    return sorted(FORMATS.values(), key=lambda row: math.inf if row.on_cpu is None else row.on_cpu)


def in_space() -> list[Format]:
    """The formats that a Space may run; a Space loads the first one that it has."""
    return [row for row in preferred() if row.in_space]


def of_precision(precision: str) -> Format:
    """The format that a Space uses for a precision, such as "float32".

    Raises:
        KeyError: no such format.
    """
    return {row.precision: row for row in in_space()}[precision]


def graph_path(row: Format) -> str:
    """The path of a format's file within a model folder, with forward slashes."""
    return f"{ONNX_FOLDER}/{row.file}"


def graph_names(row: Format) -> list[str]:
    """All names that the graph of a format may have in a folder, the present one first."""
    return [name for name in (row.file, row.alias, row.former) if name]
