"""`make bench`: every layer ranking on the same model, the same calibration rows and the same held-out rows.

The model and texts are those of `gradmap-hub demo`. For each ranking: what it removes, perplexity without and with
the correction on text like the calibration text and on text of another source, and the seconds it took here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gradmap_hub.architectures import ARCHITECTURES
from gradmap_hub.calibration import evaluation_rows, read_text, split_rows
from gradmap_hub.compensation import fit_correction
from gradmap_hub.config import PruneConfig
from gradmap_hub.decoder import Decoder, parameters_replaced
from gradmap_hub.demo import CALIBRATION, ELSEWHERE, fetch_original
from gradmap_hub.evaluation import perplexity, row_losses
from gradmap_hub.progress import SilentReporter
from gradmap_hub.scoring import score_layers
from gradmap_hub.selection import candidates


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the layers to remove (default 0.25)")
    parser.add_argument("--rows", type=int, default=12, help="held-out rows of 512 tokens per text (default 12)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder for model and result")
    arguments = parser.parse_args()
    result = run(arguments.output, arguments.ratio, arguments.rows)
    (arguments.output / "rankings.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("ranking", "removed", "like calibration", "corrected", "other source", "corrected", "seconds")
    for row in result:
        table.add_row(
            str(row["ranking"]),
            str(row["removed"]),
            *(f"{row[key]:.1f}" for key in _PERPLEXITIES),
            f"{row['seconds']:.0f}",
        )
    Console(width=140).print(table)


_PERPLEXITIES = ("held_out", "held_out_corrected", "elsewhere", "elsewhere_corrected")


def run(output: Path, ratio: float, rows: int) -> list[dict[str, object]]:
    """One row per ranking, plus one random draw (seed 0), which must come out worse: the benchmark can tell."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, samples = fetch_original(output, SilentReporter())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = PruneConfig(ratio=ratio, eval_rows=rows)
    texts = [read_text(samples[sample.name]) for sample in CALIBRATION]
    calibration = split_rows(
        texts, tokenizer, seq_len=config.seq_len, samples=config.samples, selection=config.selection_rows,
        held_out=rows, seed=config.seed,
    )  # fmt: skip
    held_out = torch.cat([text.ids for text in calibration.held_out])
    elsewhere = evaluation_rows(read_text(samples[ELSEWHERE.name]), tokenizer, seq_len=config.seq_len, rows=rows).ids
    decoder = Decoder(model, ARCHITECTURES["llama"], config.seq_len)
    count = config.removals(decoder.count)
    started = time.monotonic()
    scores = score_layers(decoder, calibration.fit[: config.scoring_rows], window=count)
    scoring_seconds = time.monotonic() - started
    sets = candidates(scores, count, "auto")
    sets["random"] = sorted(random.Random(0).sample(range(decoder.count), count))
    result: list[dict[str, object]] = []
    for name, removed in sets.items():
        started = time.monotonic()
        kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
        record, corrected = fit_correction(decoder, calibration, kept, removed, config, SilentReporter())
        seconds = scoring_seconds + time.monotonic() - started
        row: dict[str, object] = {"ranking": name, "removed": removed, "seconds": seconds, "site": record.site}
        for key, ids in (("held_out", held_out), ("elsewhere", elsewhere)):
            row[key] = perplexity(row_losses(decoder, ids, kept))
            module = decoder.mlp_output(record.site if record.site is not None else kept[0])
            with parameters_replaced(module, corrected):
                row[f"{key}_corrected"] = perplexity(row_losses(decoder, ids, kept))
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


if __name__ == "__main__":
    main()
