"""`python -m benchmarks.corrections`: what stage 2 gains by where it corrects and how strong the ridge is.

One set of removed layers, the same fitting, selection and evaluation rows for all variants; the model and texts are
those of `gradmap-hub demo`. Perplexity on text of sources that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradmap_hub.architectures import ARCHITECTURES
from gradmap_hub.calibration import evaluation_rows, read_text, split_rows
from gradmap_hub.compensation import ATTENTION, MLP, Overrides, Site, fit_correction, sites_around_gaps
from gradmap_hub.config import PruneConfig
from gradmap_hub.decoder import Decoder
from gradmap_hub.demo import CALIBRATION, fetch_original
from gradmap_hub.progress import SilentReporter

# Sources of the sample wheel that are no calibration text.
FOREIGN = ("c4", "code")


def variants(kept: Sequence[int], removed: Sequence[int]) -> dict[str, tuple[list[Site] | None, list[float] | None]]:
    """Name -> sites (None: around the gaps) and strengths (None: the default's)."""
    behind = [layer for layer in kept if layer > max(removed)]
    first = [Site(behind[0], MLP, behind[0])]
    around = sites_around_gaps(kept, removed)
    further = [Site(layer, part, layer) for layer in behind[1:3] for part in (ATTENTION, MLP)]
    return {
        "first MLP behind the gap, 0.03": (first, [0.03]),
        "first MLP behind the gap, 0.003": (first, [0.003]),
        "MLPs of all later layers, 0.03": ([Site(layer, MLP, layer) for layer in behind], [0.03]),
        "around the gap, 0.03": (around, [0.03]),
        "around the gap, 0.003": (around, [0.003]),
        "around the gap, default": (None, None),
        "around the gap and two layers on, default": (around + further, None),
    }


def mean_perplexities(decoder: Decoder, texts: dict[str, Tensor], kept: Sequence[int], overrides: Overrides) -> Any:
    with ExitStack() as corrected:
        for (layer, name), value in overrides.items():
            corrected.enter_context(decoder.replaced(layer, {name: value}))
        losses = {name: decoder.losses(ids, kept) for name, ids in texts.items()}
    return {name: math.exp(math.fsum(rows) / len(rows)) for name, rows in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corrections", description=__doc__)
    parser.add_argument("--drop", default="12,13,14,15,16,17,18", help="layers to remove")
    parser.add_argument("--samples", type=int, default=32, help="fitting rows of 512 tokens (default 32)")
    parser.add_argument("--rows", type=int, default=8, help="evaluation rows per text (default 8)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, samples = fetch_original(arguments.output, SilentReporter())
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder).eval(), ARCHITECTURES["llama"], 512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    removed = [int(part) for part in arguments.drop.split(",")]
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    config = PruneConfig(drop=tuple(removed), samples=arguments.samples)
    rows = split_rows(
        [read_text(samples[sample.name]) for sample in CALIBRATION], tokenizer, seq_len=512,
        samples=config.samples, selection=config.selection_rows, held_out=arguments.rows, seed=0,
    )  # fmt: skip
    texts = {"held-out calibration": torch.cat([text.ids for text in rows.held_out])}
    for path in samples.values():
        if path.stem in FOREIGN:
            texts[path.stem] = evaluation_rows(read_text(path), tokenizer, seq_len=512, rows=arguments.rows).ids
    results: list[dict[str, Any]] = []
    table = Table("correction", *texts, "matrices changed", "seconds")

    def show(name: str, perplexity: dict[str, float], changed: int, seconds: float) -> None:
        results.append({"correction": name, "perplexity": perplexity, "matrices": changed, "seconds": seconds})
        table.add_row(name, *(f"{value:.2f}" for value in perplexity.values()), str(changed), f"{seconds:.0f}")
        print(json.dumps(results[-1]), flush=True)

    show("original", mean_perplexities(decoder, texts, range(decoder.count), {}), 0, 0.0)
    show("none", mean_perplexities(decoder, texts, kept, {}), 0, 0.0)
    for name, (sites, strengths) in variants(kept, removed).items():
        started = time.perf_counter()
        _, overrides = fit_correction(
            decoder, rows, removed, config, SilentReporter(), sites=sites, strengths=strengths
        )  # fmt: skip
        seconds = time.perf_counter() - started
        show(name, mean_perplexities(decoder, texts, kept, overrides), len(overrides), seconds)
    (arguments.output / "corrections.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
