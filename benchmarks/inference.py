"""`make bench-inference`: speed and quality of every artifact of a published folder.

    python -m benchmarks.inference FOLDER [--original FOLDER] [--gguf FILE] [--rounds 5] [--threads N] [--write-docs]

FOLDER is the output of `push` or `prune` (checkpoint and onnx/), --original the unpruned model. Backends: PyTorch eager
in float32, every ONNX artifact on ONNX Runtime through `gradmap_hub.runtime`, and llama.cpp if llama-cpp-python is
installed and --gguf names the GGUF file of the original (see llamacpp.py). All backends are loaded once in one process
and run in turn, with batch 1 and batch 8; the table shows medians with bootstrap intervals. Peak memory is measured in
a process with that backend alone; time to first token is that of `gradmap-hub generate`, process start included.
Perplexity: C4 text of the demo, sequences of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import llamacpp
from gradmap_hub.evaluation import speed
from gradmap_hub.evaluation.speed import (
    PROMPT_TOKENS,
    Backend,
    Eager,
    OnnxRuntime,
    Timed,
    median_interval,
    peak_memory,
    take_turns,
)
from gradmap_hub.exporters.recipes import LADDERS
from gradmap_hub.formats import FORMATS

PYTORCH = "PyTorch fp32"
LLAMA_CPP = "llama.cpp "
NEW_TOKENS, ROW_TOKENS, BATCH = 64, 512, 8
COLD_STARTS = 3
PROMPT = "Gravity is"
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- inference: begin -->", "<!-- inference: end -->"


@dataclass
class Entry:
    """One backend on one model.

    `bytes`: file size; `memory`: peak bytes; `one`, `many`: seconds per round with batch 1 and batch BATCH; `cold`:
    seconds from process start to first token; `nll`: mean of each sequence, nats per token.
    """

    model: str
    backend: str
    bytes: int
    memory: int | None = None
    one: Timed = field(default_factory=Timed)
    many: Timed = field(default_factory=Timed)
    cold: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.nll))


@dataclass(frozen=True)
class Runnable:
    """A backend that can be measured on a folder. `open` takes the batch size; `memory` returns peak bytes, or None;
    `cold` returns seconds from process start to first token."""

    name: str
    bytes: int
    open: Callable[[int], Backend]
    memory: Callable[[], int | None] = lambda: None
    cold: Callable[[], float] | None = None


def runnables(folder: Path, threads: int) -> list[Runnable]:
    """PyTorch, if the folder has safetensors, and every ONNX artifact."""
    from gradmap_hub.runtime import available_artifacts

    found = []
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if weights:
        memory = partial(peak_memory, folder, speed.PYTORCH, threads, new_tokens=NEW_TOKENS)
        found.append(Runnable(PYTORCH, weights, lambda batch: Eager.load(folder, threads, batch=batch), memory))
    files = [path for path in folder.rglob("*.onnx*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for artifact in available_artifacts(sizes):
        memory = partial(peak_memory, folder, artifact.name, threads, new_tokens=NEW_TOKENS)
        opened = partial(OnnxRuntime, folder, artifact.name, threads, NEW_TOKENS)
        cold = partial(cold_start, folder, artifact.name)
        found.append(Runnable(artifact.name, artifact.bytes, opened, memory, cold))
    return found


def llama_runnables(folder: Path, template: Path, work: Path, threads: int) -> list[Runnable]:
    """The checkpoint in llama.cpp's types, written into `work`. `template`: the GGUF file of the original."""
    work.mkdir(parents=True, exist_ok=True)
    whole = work / "F32.gguf"
    llamacpp.write_gguf(folder, template, whole)
    files = {"F32": whole}
    for name in llamacpp.TYPES:
        files[name] = work / f"{name}.gguf"
        llamacpp.quantise(whole, files[name], name, threads)
    return [
        Runnable(LLAMA_CPP + name, file.stat().st_size, lambda rows, file=file: llamacpp.LlamaCpp(file, threads, rows))
        for name, file in files.items()
    ]


def cold_start(folder: Path, artifact: str) -> float:
    """Wall-clock seconds of `gradmap-hub generate` for one token, process start included."""
    command = [sys.executable, "-m", "gradmap_hub", "generate", str(folder), PROMPT, "--artifact", artifact]
    started = time.perf_counter()
    subprocess.run([*command, "--max-tokens", "1"], check=True, capture_output=True)
    return time.perf_counter() - started


def measure(
    models: Sequence[tuple[str, Sequence[Runnable]]],
    rows: Sequence[Sequence[int]],
    rounds: int,
    say: Callable[[str], None],
) -> list[Entry]:
    """Measure every backend of every model, in turn. `rows`: token ids for perplexity; the first gives the prompt."""
    entries: list[Entry] = []
    opened: dict[int, list[Backend]] = {1: [], BATCH: []}
    for label, found in models:
        for one in found:
            say(f"{label}, {one.name}: memory, first token, loading")
            entry = Entry(label, one.name, one.bytes, one.memory())
            entry.cold = [one.cold() for _ in range(COLD_STARTS)] if one.cold else []
            entries.append(entry)
            for count, backends in opened.items():
                backends.append(one.open(count))
    prompt = rows[0][:PROMPT_TOKENS]
    for count, backends in opened.items():
        say(f"{rounds} rounds of {len(backends)} backends, batch {count}")
        for entry, timed in zip(
            entries, take_turns(backends, prompt, rounds=rounds, new_tokens=NEW_TOKENS), strict=True
        ):
            if count == 1:
                entry.one = timed
            else:
                entry.many = timed
    for entry, backend in zip(entries, opened[1], strict=True):
        say(f"{entry.model}, {entry.backend}: perplexity")
        entry.nll = [float(backend.losses(row).mean()) for row in rows]
    return entries


HEADER = (
    "model", "backend", "MB", "prompt ms", "tok/s [95%]", "x PyTorch", f"tok/s of {BATCH} [95%]", "x PyTorch",
    "first token s", "peak MB", "perplexity", "of fp32",
)  # fmt: skip


def lines(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Table rows as text. Ratios are to PyTorch on the same model in the same rounds."""
    found = []
    for entry in entries:
        eager = next((other for other in entries if (other.model, other.backend) == (entry.model, PYTORCH)), None)
        found.append(
            (
                entry.model,
                entry.backend,
                f"{entry.bytes / 1e6:.0f}",
                f"{median_interval(entry.one.prefill)[0] * 1e3:.0f}",
                _rate(entry.one.decode, 1),
                f"{ratio(eager.one, entry.one):.2f}" if eager else "-",
                _rate(entry.many.decode, BATCH),
                f"{ratio(eager.many, entry.many):.2f}" if eager else "-",
                f"{statistics.median(entry.cold):.1f}" if entry.cold else "-",
                f"{entry.memory / 1e6:.0f}" if entry.memory else "-",
                f"{entry.perplexity:.2f}",
                f"{entry.perplexity / eager.perplexity - 1:+.2%}" if eager else "-",
            )
        )
    return found


def ratio(slower: Timed, faster: Timed) -> float:
    """Decode speed of `faster` divided by that of `slower`: median over the rounds."""
    return statistics.median(np.divide(slower.decode, faster.decode))


def _rate(seconds: Sequence[float], rows: int) -> str:
    middle, low, high = median_interval([NEW_TOKENS * rows / each for each in seconds])
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


# Perplexities within this ratio count as equal: so few sequences cannot tell them apart.
_SAME_DAMAGE = 1.001


def claims(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """Acceptance criteria of the pruned model on a CPU: (criterion, "yes" or "no", measured value)."""
    pruned = {entry.backend: entry for entry in entries if entry.model == "pruned"}
    eager = pruned.get(PYTORCH)
    original = next((entry for entry in entries if (entry.model, entry.backend) == ("original", PYTORCH)), None)
    if eager is None:
        return []
    found: list[tuple[str, bool, str]] = []
    limits = {name: FORMATS[name].limits for name in LADDERS}
    gated = {
        name: entry
        for name, entry in pruned.items()
        if (limit := limits.get(name)) is not None and entry.perplexity <= limit.perplexity * eager.perplexity
    }
    if gated:
        best = max(gated, key=lambda name: ratio(eager.one, gated[name].one))
        own = ratio(eager.one, gated[best].one)
        found.append(
            (
                "best artifact within its limit: at least 5 x PyTorch of the pruned model",
                own >= 5,
                f"{own:.2f} x ({best})",
            )
        )
        if original is not None:
            other = ratio(original.one, gated[best].one)
            found.append(("the same: at least 6 x PyTorch of the original", other >= 6, f"{other:.2f} x ({best})"))
    for name, least in (("fp32", 1.6), ("genai", 2.0)):
        if name in pruned:
            own = ratio(eager.one, pruned[name].one)
            found.append((f"{name}: at least {least} x PyTorch", own >= least, f"{own:.2f} x"))
    if "int8" in pruned:
        share = pruned["int8"].bytes / eager.bytes
        found.append(("int8: at most 0.55 of the bytes of float32", share <= 0.55, f"{share:.2f}"))
    cold = {name: statistics.median(entry.cold) for name, entry in pruned.items() if entry.cold}
    if cold:
        slowest = max(cold, key=cold.__getitem__)
        found.append(
            (
                "first token within 3 s of the start of a process",
                cold[slowest] <= 3,
                f"{cold[slowest]:.1f} s ({slowest})",
            )
        )
    for name in gated:
        damage = _SAME_DAMAGE * gated[name].perplexity
        peers = [entry for key, entry in pruned.items() if key.startswith(LLAMA_CPP) and entry.perplexity <= damage]
        if peers:
            peer = min(peers, key=lambda entry: statistics.median(entry.one.decode))
            own, many = ratio(peer.one, gated[name].one), ratio(peer.many, gated[name].many)
            line = f"{name}: as fast as the fastest llama.cpp that loses no more"
            found.append(
                (
                    line,
                    own >= 1,
                    f"{own:.2f} x {peer.backend.removeprefix(LLAMA_CPP)}; batch {BATCH} {many:.2f} x",
                )
            )
    return [(line, "yes" if holds else "no", value) for line, holds, value in found]


def markdown(entries: Sequence[Entry], settings: Mapping[str, int]) -> str:
    """Both tables, preceded by the settings of the run."""
    tables = [[HEADER, ("---",) * len(HEADER), *lines(entries)]]
    if held := claims(entries):
        tables.append([("line", "holds", "found"), ("---",) * 3, *held])
    said = ", ".join(f"{value} {name}" for name, value in settings.items())
    body = "\n\n".join("\n".join("| " + " | ".join(line) + " |" for line in table) for table in tables)
    return f"{said}; prompt {PROMPT_TOKENS} tokens, {NEW_TOKENS} generated.\n\n{body}\n"


def main() -> None:
    from gradmap_hub.machine import cpu_count

    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder of push or prune")
    parser.add_argument("--original", type=Path, help="folder of the unpruned model, with onnx/ if it has one")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the original; enables llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="sequences of 512 tokens for perplexity")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from benchmarks.inputs import model_and_samples
    from gradmap_hub.data.rows import evaluation_rows
    from gradmap_hub.data.texts import read_text
    from gradmap_hub.pipeline.demo import ELSEWHERE

    console = Console(stderr=True)
    options.output.mkdir(parents=True, exist_ok=True)
    _, samples = model_and_samples(options.folder, options.output)
    text = read_text(samples[ELSEWHERE.name], "C4")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    rows = evaluation_rows(text, tokenizer, seq_len=ROW_TOKENS, rows=options.rows).ids.tolist()
    folders = [("pruned", options.folder)]
    if options.original is not None:
        folders.insert(0, ("original", options.original))
    models = []
    for label, folder in folders:
        found = runnables(folder, options.threads)
        if label == "pruned" and options.gguf is not None and llamacpp.available():
            found += llama_runnables(folder, options.gguf, options.output / f"gguf-{label}", options.threads)
        models.append((label, found))
    entries = measure(models, rows, options.rounds, lambda said: console.print(said, highlight=False))
    for header, body in ((HEADER, lines(entries)), (("line", "holds", "found"), claims(entries))):
        table = Table(*header)
        for line in body:
            table.add_row(*line)
        Console(width=200).print(table)
    settings = {"threads": options.threads, "processors": os.cpu_count() or 0, "rounds": options.rounds}
    result = {"settings": settings, "entries": [asdict(entry) for entry in entries]}
    (options.output / "inference.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(entries, settings)
    (options.output / "inference.md").write_text(text, encoding="utf-8")
    if options.write_docs:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
