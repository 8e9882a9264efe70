"""`make bench`: compares GradMAP with its peers on one model, on the same calibration and held-out sequences.

    python -m benchmarks [--quick | --full] [--layers 7,8] [--draws N] [--dtype auto] [--device cpu] [--model FOLDER]
                         [--accuracy N]

Model and calibration texts are those of `gradmap-hub demo`. The table goes to stdout; bench.json, bench.md,
quality-time.png and cells.jsonl go to OUTPUT. An interrupted run resumes from cells.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gradmap_hub
from benchmarks import accuracy, methods, table
from benchmarks.inputs import SEQ_LEN, data, dtype_of, load, model_and_samples
from benchmarks.plot import quality_time
from gradmap_hub.config import PruneConfig
from gradmap_hub.data.rows import Rows, sha256_of_ids
from gradmap_hub.machine import cpu_count
from gradmap_hub.models.decoder import Decoder

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks.md"
_VERSIONED = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Size:
    """Numbers of sequences and draws, and the layer counts. `sleb_rows`, `sleb_shares`: see `methods.Work`."""

    pool: int
    evaluation: int
    timed: int
    draws: int
    sleb_draws: int
    layers: tuple[int, ...]
    sleb_rows: int
    sleb_shares: bool


# Quick: one SLEB run on a few sequences gives both its quality and its time; it takes a third of the whole run.
QUICK = Size(pool=12, evaluation=3, timed=3, draws=1, sleb_draws=1, layers=(7,), sleb_rows=3, sleb_shares=False)
FULL = Size(pool=40, evaluation=8, timed=4, draws=5, sleb_draws=1, layers=(7, 8), sleb_rows=8, sleb_shares=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    size = FULL if options.full else QUICK
    draws = options.draws or size.draws
    sleb_draws = 0 if options.no_sleb else size.sleb_draws if options.sleb_draws is None else options.sleb_draws
    peer_draws = draws if options.peer_draws is None else min(options.peer_draws, draws)
    layers = options.layers or size.layers
    dtype = dtype_of(options.dtype, options.device)
    console = Console(stderr=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - started:6.0f} s] {text}", markup=False, highlight=False)

    # Report a missing harness before the long run, not after it.
    no_accuracy = accuracy.missing() if options.accuracy else None
    if no_accuracy is not None:
        say(no_accuracy)
    accuracy_rows: int = 0 if no_accuracy is not None else options.accuracy
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    folder, samples = model_and_samples(options.model, output)
    decoder, tokenizer = load(folder, dtype, options.device)
    pools, texts, sources = data(samples, tokenizer, pool=size.pool, evaluation=size.evaluation, draws=draws)
    # What a finished cell depends on besides its own key. Counts and draws are left out: they may be extended.
    settings = {
        "model": folder.name if options.model is None else str(folder.resolve()),
        "pool": size.pool,
        "evaluation": [sha256_of_ids(text.ids) for text in texts],
        "calibration": {name: sha for name, sha in sources.items() if name.startswith("calibration")},
        "sleb_rows": size.sleb_rows,
        "dtype": str(dtype),
        "device": options.device,
        "engine": _engine_sha256(),
    }
    store = methods.Store(output / "cells.jsonl", settings, fresh=options.fresh)
    work = methods.Work(decoder, pools, texts, store, size.sleb_rows, size.sleb_shares, say)
    _warm_up(decoder)
    further = 1 if options.further_draws else 0
    cells = list(methods.cells(work, layers, draws, sleb_draws, peer_draws, first=further))
    if options.further_draws:
        say(f"{store.computed} pieces computed")
        return
    timed = methods.times(work, size.timed, with_sleb=sleb_draws > 0)
    accuracies = accuracy.measure(work, tokenizer, cells, accuracy_rows) if accuracy_rows else {}
    layer_parameters = [sum(p.numel() for p in layer.parameters()) for layer in decoder.layers]
    parameters = sum(p.numel() for p in decoder.model.parameters())
    rows = table.build_rows(cells, layer_parameters, parameters, accuracies)
    verdicts = table.verdicts(rows, timed)
    ran_on = {
        "machine": _machine(decoder.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}},
        "settings": {
            **settings,
            **asdict(size),
            "layers": layers,
            "draws": draws,
            "peer_draws": peer_draws,
            "sleb_draws": sleb_draws,
        },
        "model": str(folder.name),
        "data_sha256": sources,
        "seconds_this_run": time.perf_counter() - started,
        "cells_computed_this_run": store.computed,
    }
    if accuracies:
        ran_on["accuracy"] = {
            "harness": f"lm-eval {accuracy.harness()}",
            "rows": accuracy_rows,
            "tasks": [*accuracy.TASKS],
        }
    _write(output, rows, cells, timed, verdicts, ran_on, _facts(ran_on, texts, size, sleb_draws), options.write_docs)
    quality_time(rows, layers[0], output / "quality-time.png")
    if options.write_docs:
        shutil.copyfile(output / "quality-time.png", DOCS.parent / "images" / "quality-time.png")
    _show(rows, timed, verdicts)
    say(f"{store.computed} pieces computed; bench.json, bench.md and quality-time.png are in {output}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="few sequences, one draw, 7 layers (default)")
    kind.add_argument(
        "--full", action="store_true", help="three times the sequences, five draws, 7 and 8 layers; over two hours"
    )
    parser.add_argument("--layers", type=_counts, help="numbers of layers to remove, such as 7,8")
    parser.add_argument("--draws", type=int, help="random draws of calibration sequences (default 1, with --full 5)")
    parser.add_argument(
        "--further-draws", action="store_true", help="compute only the draws after the first and print no table; "
        "times are measured on the first draw, so these can run on a busy machine"
    )  # fmt: skip
    parser.add_argument("--sleb-draws", type=int, help="draws on which SLEB runs (default 1; SLEB is the slowest)")
    parser.add_argument("--peer-draws", type=int, help="draws on which the other peers run (default: all)")
    parser.add_argument("--no-sleb", action="store_true", help="skip SLEB and the times relative to it")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of all passes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a model folder with tokenizer (default: the demo's sample)")
    parser.add_argument("--accuracy", type=_documents, default=0, help="documents per lm-eval task (default 0: skip)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default build/bench")
    parser.add_argument("--fresh", action="store_true", help="delete the results of earlier runs first")
    parser.add_argument("--write-docs", action="store_true", help="write tables and plot into docs/")
    return parser.parse_args(arguments)


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({int(part) for part in text.split(",")}))
    if not counts or counts[0] < 1:
        raise argparse.ArgumentTypeError("expected positive numbers of layers, such as 7,8")
    return counts


def _documents(text: str) -> int:
    number = int(text)
    if number < 0 or number == 1:
        raise argparse.ArgumentTypeError("expected 0 or at least 2: one document has no standard error")
    return number


def _engine_sha256(package: Path = Path(gradmap_hub.__file__).parent) -> str:
    """Hash of the code that selects and computes; a store never mixes results of different code."""
    digest = hashlib.sha256()
    for folder in ("pruning", "models", "data"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    digest.update(inspect.getsource(PruneConfig).encode())
    digest.update((ROOT / "benchmarks" / "peers.py").read_bytes())
    return digest.hexdigest()[:16]


def _warm_up(decoder: Decoder) -> None:
    """Run one pass, so that no method is charged for starting threads and compiling kernels."""
    ids = torch.zeros(1, decoder.tokens, dtype=torch.long)
    decoder.losses(ids)
    methods.score_layers(decoder, ids)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [entry for entry in cpuinfo.read_text(errors="replace").splitlines() if entry.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {cpu_count()} cores"


def _facts(ran_on: dict[str, Any], texts: Sequence[Rows], size: Size, sleb_draws: int) -> list[str]:
    """The notes printed above the table."""
    settings, versions = ran_on["settings"], ran_on["versions"]
    sleb = "SLEB was not run"
    if sleb_draws:
        sleb = f"SLEB uses {size.sleb_rows} of the sequences; "
        sleb += "its trials share hidden states" if size.sleb_shares else "every trial runs the whole model"
    facts = [
        f"{ran_on['model']} on {ran_on['machine']}, {settings['dtype']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"Calibration: {size.pool} sequences of {SEQ_LEN} tokens per draw (Wikipedia, technical, stories), the same "
        f"for all methods; {settings['draws']} draw(s). Ours fits on three quarters of them and selects on the rest.",
        f"Evaluation: {', '.join(text.name for text in texts)}, {size.evaluation} sequences each; intervals: 95% "
        "bootstrap over sequences. `mean`: exp of the mean log-perplexity over texts; over draws, the geometric mean.",
        f"{sleb}."
        + (
            f" The default runs on {settings['draws']} draws, {', '.join(methods.EVERY_DRAW)} on "
            f"{settings['peer_draws']}; all others, and our stage 2 on the peers' layers, run on the first. Two "
            "methods are compared on the draws they share."
            if settings["draws"] > 1
            else ""
        ),
        "Seconds: selection + compensation on the first draw, counted in full for each method, although equal sets "
        "are evaluated once; Prune&Comp rescales during selection. MiB: peak memory above the start (without the "
        "weights). Forwards: passes through all layers over the calibration sequences; a backward pass counts as two, "
        "the head is not counted.",
    ]
    if "accuracy" in ran_on:
        tasks = ", ".join(f"{name} ({task.main})" for name, task in accuracy.TASKS.items())
        facts.append(
            f"Accuracy in %: mean of {tasks}, the first {ran_on['accuracy']['rows']} documents each, zero-shot, "
            f"{ran_on['accuracy']['harness']}; ± the standard error over documents. First draw only; '-': not run."
        )
    return facts


def _write(
    output: Path,
    rows: Sequence[table.Row],
    cells: Sequence[methods.Cell],
    timed: dict[str, dict[str, float]],
    verdicts: Sequence[table.Verdict],
    ran_on: dict[str, Any],
    facts: Sequence[str],
    write_docs: bool,
) -> None:
    result = {
        "rows": [table.as_json(row) for row in rows],
        "time": timed,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "cells": [asdict(cell) for cell in cells],
        "ran_on": ran_on,
    }
    (output / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    produced = table.markdown(rows, timed, verdicts, facts)
    (output / "bench.md").write_text(produced, encoding="utf-8")
    if write_docs:
        DOCS.write_text(table.into_docs(DOCS.read_text(encoding="utf-8"), produced), encoding="utf-8")


def _show(rows: Sequence[table.Row], timed: dict[str, dict[str, float]], verdicts: Sequence[table.Verdict]) -> None:
    console = Console(width=200)
    shown = Table(*table.header(rows))
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous.count != row.count:
            shown.add_section()
        shown.add_row(
            *table.line(row, table.has_accuracy(rows)), style="bold" if row.method == methods.DEFAULT else None
        )
    console.print(shown)
    times = Table(*table.TIME_HEADER)
    for entry in table.time_lines(timed):
        times.add_row(*entry)
    console.print(times)
    for verdict in verdicts:
        word = "not measured" if verdict.holds is None else str(verdict.holds)
        console.print(f"{word:>12}  {verdict.line}: {verdict.found}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
