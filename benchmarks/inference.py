"""`make bench-inference`: how fast every artifact of a published folder is, and what it costs in quality.

    python -m benchmarks.inference FOLDER [--original FOLDER] [--rounds 5] [--threads N]

FOLDER is what `push` or `prune` wrote (checkpoint and onnx/); --original the model it was made from. Backends: PyTorch
eager in float32, and every ONNX artifact on ONNX Runtime through `gradmap_hub.runtime`. All are loaded once in one
process and take turns, round by round; reported are medians and their bootstrap intervals. Peak memory is that of a
process with the one backend. Perplexity: C4 text of the demo, rows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gradmap_hub import speed
from gradmap_hub.speed import PROMPT_TOKENS, Backend, Eager, OnnxRuntime, median_interval, peak_memory, take_turns

PYTORCH = "PyTorch fp32"
NEW_TOKENS, ROW_TOKENS = 64, 512
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Entry:
    """One backend on one model. Seconds per round; `nll`: mean per row, nats per token."""

    model: str
    backend: str
    bytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    memory: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.nll))


def backends_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of everything in a folder that can be run."""
    from gradmap_hub.runtime import available_artifacts

    found = []
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if weights:
        found.append((PYTORCH, weights))
    files = [path for path in folder.rglob("*.onnx*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return found + [(artifact.name, artifact.bytes) for artifact in available_artifacts(sizes)]


def open_backend(folder: Path, name: str, threads: int) -> Backend:
    return Eager.load(folder, threads) if name == PYTORCH else OnnxRuntime(folder, name, threads, NEW_TOKENS)


def measure(
    folders: Sequence[tuple[str, Path]],
    rows: Sequence[Sequence[int]],
    rounds: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Entry]:
    """Every backend of every folder, in turn."""
    opened: list[tuple[Entry, Backend]] = []
    for label, folder in folders:
        for name, size in backends_of(folder):
            say(f"{label}, {name}: memory, loading")
            backend = speed.PYTORCH if name == PYTORCH else name
            memory = peak_memory(folder, backend, threads, new_tokens=NEW_TOKENS) or 0
            opened.append((Entry(label, name, size, memory=memory), open_backend(folder, name, threads)))
    prompt = rows[0][:PROMPT_TOKENS]
    say(f"{rounds} rounds of {len(opened)} backends")
    times = take_turns([backend for _, backend in opened], prompt, rounds=rounds, new_tokens=NEW_TOKENS)
    for (entry, _), timed in zip(opened, times, strict=True):
        entry.prefill, entry.decode = timed.prefill, timed.decode
    for entry, backend in opened:
        say(f"{entry.model}, {entry.backend}: perplexity")
        entry.nll = [float(backend.losses(row).mean()) for row in rows]
    return [entry for entry, _ in opened]


HEADER = ("model", "backend", "MB", "prefill ms", "decode tok/s [95%]", "x PyTorch", "peak MB", "perplexity", "of fp32")


def lines(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The table. The ratios are to PyTorch of the same model, in the same rounds."""
    found = []
    for entry in entries:
        eager = next((other for other in entries if (other.model, other.backend) == (entry.model, PYTORCH)), None)
        middle, low, high = median_interval([NEW_TOKENS / seconds for seconds in entry.decode])
        ratio = cost = "-"
        if eager is not None:
            ratio = f"{statistics.median(np.divide(eager.decode, entry.decode)):.2f}"
            cost = f"{entry.perplexity / eager.perplexity - 1:+.2%}"
        found.append(
            (
                entry.model,
                entry.backend,
                f"{entry.bytes / 1e6:.0f}",
                f"{median_interval(entry.prefill)[0] * 1e3:.0f}",
                f"{middle:.1f} [{low:.1f}, {high:.1f}]",
                ratio,
                f"{entry.memory / 1e6:.0f}",
                f"{entry.perplexity:.2f}",
                cost,
            )
        )
    return found


def main() -> None:
    from gradmap_hub.runtime.artifacts import cpu_count

    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder that push or prune wrote")
    parser.add_argument("--original", type=Path, help="the model it was made from, with its onnx/ if it has one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens, for perplexity")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from benchmarks.inputs import model_and_samples
    from gradmap_hub.calibration import evaluation_rows, read_text
    from gradmap_hub.demo import ELSEWHERE

    console = Console(stderr=True)
    options.output.mkdir(parents=True, exist_ok=True)
    _, samples = model_and_samples(options.folder, options.output)
    text = read_text(samples[ELSEWHERE.name], "C4")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    rows = evaluation_rows(text, tokenizer, seq_len=ROW_TOKENS, rows=options.rows).ids.tolist()
    folders = [("pruned", options.folder)]
    if options.original is not None:
        folders.insert(0, ("original", options.original))
    entries = measure(folders, rows, options.rounds, options.threads, lambda said: console.print(said, highlight=False))
    table = Table(*HEADER)
    for line in lines(entries):
        table.add_row(*line)
    Console(width=160).print(table)
    settings = {"threads": options.threads, "processors": os.cpu_count(), "rounds": options.rounds}
    result = {"settings": settings, "entries": [asdict(entry) for entry in entries]}
    (options.output / "inference.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    markdown = ["| " + " | ".join(line) + " |" for line in (HEADER, ("---",) * len(HEADER), *lines(entries))]
    (options.output / "inference.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
