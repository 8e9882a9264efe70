"""The table of export formats: one row each. Whatever knows a format by its name reads it here.

A further format is a row (`register`) and a function that writes its file (`gradmap_hub.exporters.export.register`).
"""

from __future__ import annotations

from dataclasses import dataclass

# Optimum's graph. It comes with every export; the others are asked for by name.
ONNX = "onnx"
# Folder of the exported files within a model folder.
ONNX_FOLDER = "onnx"


@dataclass(frozen=True)
class Limits:
    """What a graph may differ from the checkpoint by. `perplexity`: the largest ratio. `logits`: the largest absolute
    difference, None for no limit. `greedy`: whether every greedy token must be the checkpoint's."""

    perplexity: float
    logits: float | None = None
    greedy: bool = False


_FLOAT32 = Limits(perplexity=1.001, logits=1e-3, greedy=True)


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: In records, `--to` and `--quantize`.
        file: The graph, in the folder onnx/; weights too large for one file lie beside it.
        precision: What a Space calls it, in compare.json.
        artifact: What `--artifact`, `generate` and `serve` call it.
        title: Of the export, as progress shows it.
        limits: What the check allows.
        least_share, most_share: Bytes of its file as a share of the float32 weights.
        in_space: Whether a comparison Space may run it.
        on_cpu, on_cuda: Rank in the choice for a machine, lowest first; None: never chosen without being asked for.
        in_genai_config: Rank in the choice of the graph that genai_config.json names; None: never.
        may_fail: Whether a file that fails its check is left out and the run goes on.
        advice: A sentence for whoever's file failed.
    """

    name: str
    file: str
    precision: str
    artifact: str
    title: str
    limits: Limits = _FLOAT32
    least_share: float = 1.0
    most_share: float = 1.0
    in_space: bool = False
    on_cpu: int | None = None
    on_cuda: int | None = None
    in_genai_config: int | None = None
    may_fail: bool = False
    advice: str = ""


# On a CPU, int8 costs under 2 % of perplexity and is the fastest that does. int4 costs more than a user expects of a
# small model, so it comes last. Weight-only integers are made for the CPU's kernels; a GPU prefers half precision.
# The least share of a quantised file: 8 (4) bits, and a scale of 32 bits for each 32 weights.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "int8", "model_int8.onnx", "int8", "int8", "Exporting to ONNX with 8-bit weights, comparing with PyTorch",
            Limits(perplexity=1.02), least_share=9 / 32, most_share=0.4, in_space=True, on_cpu=0, on_cuda=2,
            in_genai_config=0, may_fail=True,
        ),
        Format(
            "genai", "model_genai.onnx", "genai", "genai", "Exporting GenAI's ONNX graph, comparing with PyTorch",
            most_share=1.05, on_cpu=1, in_genai_config=1,
        ),
        Format(
            ONNX, "model.onnx", "float32", "fp32", "Exporting to ONNX, comparing with PyTorch",
            in_space=True, on_cpu=2, on_cuda=1,
        ),
        Format(
            "fp16", "model_fp16.onnx", "fp16", "fp16", "Exporting to ONNX in float16, comparing with PyTorch",
            Limits(perplexity=1.005), least_share=0.5, most_share=0.55, on_cuda=0,
        ),
        Format(
            "int4", "model_int4.onnx", "int4", "int4", "Exporting to ONNX with 4-bit weights, comparing with PyTorch",
            Limits(perplexity=1.10), least_share=5 / 32, most_share=0.4, in_space=True, on_cpu=3, on_cuda=3,
            in_genai_config=2, may_fail=True, advice="int8 is the better artifact for this model.",
        ),
    )
}  # fmt: skip


def register(row: Format) -> None:
    """Add a format to the table.

    Raises:
        ValueError: its name or its file is taken.
    """
    if row.name in FORMATS or row.file in {other.file for other in FORMATS.values()}:
        raise ValueError(f"There is a format of the name {row.name!r} or the file {row.file!r} already.")
    FORMATS[row.name] = row


def quantized() -> list[str]:
    """The names of all formats but Optimum's graph: what `--quantize` takes."""
    return [name for name in FORMATS if name != ONNX]


def in_space() -> list[Format]:
    """The formats that a Space may run, the one to begin with first."""
    return [row for row in FORMATS.values() if row.in_space]


def of_precision(precision: str) -> Format:
    """The format that a Space calls by this precision.

    Raises:
        KeyError: there is none.
    """
    return {row.precision: row for row in FORMATS.values()}[precision]


def graph_path(row: Format) -> str:
    """Where the graph lies in a model folder."""
    return f"{ONNX_FOLDER}/{row.file}"
