"""Plans a comparison Space: its precisions, whether they fit the hardware, and where the original's files come from.

Computed from a record and from file sizes, before anything is exported or uploaded. Both models always run in the same
precision, and one precision is loaded at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gradmap_hub.formats import graph_path, in_space, of_precision
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import Artifact, Base, RunRecord

# Licences that allow redistribution of the weights. No other original is republished, and no gated or private one.
REDISTRIBUTABLE = frozenset(
    {
        "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-4.0", "cc-by-sa-4.0",
        "cc0-1.0", "isc", "mit", "openmdw-1.0", "unlicense", "wtfpl", "zlib",
    }
)  # fmt: skip

# Folder of a stored original in the Space.
ORIGINAL_FOLDER = "original"

OriginalSource = Literal["hub", "space", "transformers"]


@dataclass(frozen=True)
class Hardware:
    """Space hardware: its name on the Hub, memory and disk in bytes."""

    name: str
    memory: int
    disk: int


# 2 vCPU, 16 GB, 50 GB: https://huggingface.co/docs/hub/spaces-overview
CPU_BASIC = Hardware("cpu-basic", 16_000_000_000, 50_000_000_000)
# Memory in bytes: the program without models (Python, gradio, and ONNX Runtime or torch), and per byte of both models'
# files. ONNX Runtime holds the weights twice while it repacks them.
_PROGRAM = {"onnx": 600_000_000, "transformers": 1_200_000_000}
_PER_BYTE = {"onnx": 2.0, "transformers": 1.2}
# Disk in bytes for the packages and temporary files.
_DISK_RESERVE = 3_000_000_000


@dataclass(frozen=True)
class SpacePlan:
    """What the Space runs.

    Attributes:
        original: Source of the original: "hub", the ONNX files in its own repository; "space", an export stored in the
            Space; "transformers", no ONNX files: both models run in transformers, from their repositories.
        reason: A sentence for the user.
        precisions: Precisions of both models; the Space loads the first one at start. Empty: nothing fits, so no Space.
        stored: The precisions in which the Space stores an export of the original.
        pairs: Bytes of both models' files by precision; exact sizes, or lower bounds.
    """

    original: OriginalSource
    reason: str
    precisions: tuple[str, ...] = ("float32",)
    stored: tuple[str, ...] = ()
    pairs: Mapping[str, BeforeAfter] = field(default_factory=dict, compare=False)

    @property
    def runtime(self) -> Literal["onnx", "transformers"]:
        return "transformers" if self.original == "transformers" else "onnx"


def memory_needed(pair: BeforeAfter, runtime: Literal["onnx", "transformers"]) -> int:
    """Bytes of memory that the app needs for both models. `pair`: bytes of their files."""
    return round(_PROGRAM[runtime] + _PER_BYTE[runtime] * (pair.before + pair.after))


def may_be_stored(base: Base) -> bool:
    """Whether the original's terms allow publishing an export of it with the Space."""
    return not base.gated and not base.private and base.license in REDISTRIBUTABLE


def plan_space(
    base: Base,
    precisions: Collection[str],
    float32: BeforeAfter,
    sizes: Mapping[str, BeforeAfter] | None = None,
    *,
    hardware: Hardware = CPU_BASIC,
) -> SpacePlan:
    """Decide what the Space runs and where the original's files come from.

    Args:
        base: The original and its terms.
        precisions: Precisions of the pruned model's ONNX files (`Format.precision`); empty without ONNX.
        float32: Bytes of both models' weights in float32; a lower bound.
        sizes: Bytes of both models' files by precision, where known.
        hardware: The hardware of the Space.
    """
    names = [row.precision for row in in_space()]
    pairs = {name: _at_least(name, float32) for name in names} | dict(sizes or {})
    refused: list[str] = []
    chosen: list[str] = []
    used = 0
    # Older records have no `exports`, only whether model.onnx exists.
    own = [*base.exports, *(["float32"] if base.has_onnx else [])] if base.repo_id is not None else []
    stored = [name for name in names if name in precisions and name not in own]
    for name in names:
        if name not in precisions or (name in stored and not may_be_stored(base)):
            continue
        problem = _too_large(pairs[name], "onnx", hardware, used)
        if problem:
            refused.append(f"{name} {problem}")
        else:
            chosen.append(name)
            used += pairs[name].before + pairs[name].after
    left_out = "".join(f"; {words}" for words in refused)
    if chosen:
        stored = [name for name in stored if name in chosen]
        words = _words(chosen, stored, base) + left_out
        return SpacePlan(
            "space" if stored else "hub", words, tuple(chosen), tuple(stored), {name: pairs[name] for name in chosen}
        )
    return _with_transformers(base, precisions, float32, hardware, left_out)


def _with_transformers(
    base: Base, precisions: Collection[str], float32: BeforeAfter, hardware: Hardware, left_out: str
) -> SpacePlan:
    if not precisions:
        cause = "no ONNX files are exported, so the Space runs both models in transformers"
    elif not may_be_stored(base):
        licence = f"under a licence ({base.license}) that may forbid it"
        kind = "gated" if base.gated else "private" if base.private else licence
        cause = (
            f"the original is {kind}, so it is not exported again and stored in the Space; "
            "the Space runs both models in transformers, from their own repositories"
        )
    else:
        cause = "the ONNX files are too large for the Space, so it runs both models in transformers"
    if base.needs_5:
        words = f"no Space: {cause}; but the original is for transformers 5 and the Space has 4.57{left_out}"
        return SpacePlan("transformers", words, ())
    halved = BeforeAfter(float32.before // 2, float32.after // 2)
    tries = [("float32", float32)] + ([(base.dtype, halved)] if base.dtype in ("bfloat16", "float16") else [])
    problem = ""
    for name, pair in tries:
        problem = _too_large(pair, "transformers", hardware, 0)
        if not problem:
            return SpacePlan("transformers", f"{cause}, in {name}{left_out}", (name,))
    return SpacePlan(
        "transformers",
        f"no Space: both models are too large for {hardware.name}: {tries[-1][0]} {problem}{left_out}. "
        "Run `gradmap-hub compare` on a larger machine, or export int8",
        (),
    )


def _words(chosen: list[str], stored: list[str], base: Base) -> str:
    names = ", ".join(chosen)
    if not stored:
        return f"the original's repository has the ONNX files ({names})"
    if len(stored) < len(chosen):
        fetched = ", ".join(name for name in chosen if name not in stored)
        return (
            f"the original's repository has ONNX files in {fetched}; "
            f"its export in {', '.join(stored)} is stored in the Space"
        )
    return f"the original has no ONNX files like the pruned model's, so its export is stored in the Space ({names})"


def _at_least(name: str, float32: BeforeAfter) -> BeforeAfter:
    share = of_precision(name).least_share
    return BeforeAfter(round(share * float32.before), round(share * float32.after))


def _too_large(pair: BeforeAfter, runtime: Literal["onnx", "transformers"], hardware: Hardware, used: int) -> str:
    """The reason why the models do not fit `hardware`, or an empty string. `used`: bytes of disk that other precisions
    use."""
    memory = memory_needed(pair, runtime)
    if memory > hardware.memory:
        return f"needs about {memory / 1e9:.1f} GB of memory, and {hardware.name} has {hardware.memory / 1e9:.0f} GB"
    disk = used + pair.before + pair.after + _DISK_RESERVE
    if disk > hardware.disk:
        return f"needs about {disk / 1e9:.1f} GB of disk, and {hardware.name} has {hardware.disk / 1e9:.0f} GB"
    return ""


def precisions_of(record: RunRecord) -> list[str]:
    """The precisions of a finished run's ONNX files that a Space can run."""
    paths = {entry.path for entry in record.artifacts}
    return [row.precision for row in in_space() if graph_path(row) in paths]


def graph_of(record: RunRecord, precision: str) -> tuple[int, Artifact | None]:
    """Bytes of the pruned model's files in a precision (graph and external data), and the artifact of the graph."""
    path = graph_path(of_precision(precision))
    entries = [entry for entry in record.artifacts if entry.path in (path, f"{path}_data")]
    graph = next((entry for entry in entries if entry.path == path), None)
    return sum(entry.bytes for entry in entries), graph


def plan_of(record: RunRecord, base: Base | None = None) -> SpacePlan:
    """Plan the Space of a finished run from the sizes of its files; the original's are estimated by the ratio of
    parameters. `base`: the terms of the original, by default the recorded ones."""
    float32 = BeforeAfter(4 * record.parameters.before, 4 * record.parameters.after)
    return plan_space(base or record.base, precisions_of(record), float32, pairs_of(record))


def pairs_of(record: RunRecord) -> dict[str, BeforeAfter]:
    """Bytes of both models' files by precision; the original's are estimated by the ratio of parameters."""
    share = record.parameters.before / max(record.parameters.after, 1)
    found = {name: graph_of(record, name)[0] for name in precisions_of(record)}
    return {name: BeforeAfter(round(pruned * share), pruned) for name, pruned in found.items()}
