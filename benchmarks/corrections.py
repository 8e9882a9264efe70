"""`python -m benchmarks.corrections`: ablation of stage 2 (sites, kind of compensation, ridge strength).

All variants use one set of removed layers and the same fitting, selection and evaluation sequences; model and texts are
those of `make bench`. Perplexity is measured on texts that no variant is fitted on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import data, opened
from benchmarks.methods import split_pool
from gradmap_hub.config import Compensation, PruneConfig
from gradmap_hub.data.rows import Rows
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning.compensation import Overrides, fit_compensation
from gradmap_hub.pruning.residual import ATTENTION, MLP
from gradmap_hub.pruning.sites import Site, sites_at_gaps

DEFAULT = "default"
STRENGTHS = (0.03, 0.003, 0.001, 0.0003)


@dataclass(frozen=True)
class Variant:
    """A variant of stage 2. `sites`: None for the default sites; `strength`: ridge strength, None to select it as the
    default does; `kind`: kind of compensation."""

    name: str
    sites: list[Site] | None
    strength: float | None
    kind: Compensation = "weight"


def variants(kept: Sequence[int], removed: Sequence[int]) -> list[Variant]:
    behind = [layer for layer in kept if layer > max(removed)]
    first = [Site(behind[0], MLP, behind[0])]
    around = sites_at_gaps(kept, removed, behind=True)
    further = [Site(layer, part, layer) for layer in behind[1:3] for part in (ATTENTION, MLP)]
    return [
        Variant("projection P, first MLP behind the gap, 0.03", first, 0.03, "projection"),
        Variant("first MLP behind the gap, 0.03", first, 0.03),
        Variant("first MLP behind the gap, 0.0003", first, 0.0003),
        *(Variant(f"last MLP before the gap, {strength}", around[:1], strength) for strength in STRENGTHS),
        Variant("MLPs of all later layers, 0.03", [Site(layer, MLP, layer) for layer in behind], 0.03),
        *(Variant(f"around the gap, {strength}", around, strength) for strength in STRENGTHS),
        Variant(DEFAULT, None, None),
        Variant("around the gap and two further layers", around + further, None),
    ]


def perplexities(
    decoder: Decoder, texts: Sequence[Rows], kept: Sequence[int], overrides: Overrides
) -> dict[str, float]:
    """Perplexity per text, and under `mean` exp of the mean log-perplexity over texts."""
    with ExitStack() as stack:
        for (layer, name), value in overrides.items():
            stack.enter_context(decoder.replaced(layer, {name: value}))
        losses = {text.name: math.fsum(decoder.losses(text.ids, kept)) / len(text.ids) for text in texts}
    return {name: math.exp(loss) for name, loss in {**losses, "mean": math.fsum(losses.values()) / len(losses)}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corrections", description=__doc__)
    parser.add_argument("--drop", default="12,13,14,15,16,17,18", help="layers to remove")
    parser.add_argument("--rows", type=int, default=36, help="sequences of 512 tokens; a quarter is for selection")
    parser.add_argument("--evaluation", type=int, default=8, help="evaluation sequences per text (default 8)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of all passes")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    decoder, tokenizer, samples = opened(arguments.output, arguments.dtype)
    removed = [int(part) for part in arguments.drop.split(",")]
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    pools, texts, _ = data(samples, tokenizer, pool=arguments.rows, evaluation=arguments.evaluation, draws=1)
    rows = split_pool(pools[0])
    results: list[dict[str, Any]] = []
    table = Table("compensation", *(text.name for text in texts), "mean", "matrices changed", "seconds")

    def show(name: str, perplexity: dict[str, float], changed: int, seconds: float) -> None:
        results.append({"correction": name, "perplexity": perplexity, "matrices": changed, "seconds": seconds})
        table.add_row(name, *(f"{value:.2f}" for value in perplexity.values()), str(changed), f"{seconds:.0f}")
        print(json.dumps(results[-1]), flush=True)

    show("original", perplexities(decoder, texts, range(decoder.count), {}), 0, 0.0)
    show("none", perplexities(decoder, texts, kept, {}), 0, 0.0)
    for variant in variants(kept, removed):
        config = PruneConfig(drop=tuple(removed), samples=len(rows.fit), compensation=variant.kind)
        strengths = None if variant.strength is None else [variant.strength]
        started = time.perf_counter()
        _, overrides = fit_compensation(
            decoder, rows, removed, config, SilentReporter(), sites=variant.sites, strengths=strengths
        )  # fmt: skip
        seconds = time.perf_counter() - started
        show(variant.name, perplexities(decoder, texts, kept, overrides), len(overrides), seconds)
    name = f"corrections-{arguments.rows}.json"
    (arguments.output / name).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
