"""`python -m benchmarks.stability`: how rankings depend on the number and the source of calibration tokens.

Each variant of the gradient magnitude and each cosine ranking chooses layers from 1, 2, 4, ... sequences of each
calibration text and of their mixture; the perplexity of every chosen set is measured on texts of other sources. One
backward pass per sequence gives all variants for every number of sequences.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.inputs import SEQ_LEN, data, opened
from benchmarks.table import ranges
from gradmap_hub.data.rows import Rows, tokenize
from gradmap_hub.data.texts import read_text
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.pipeline.demo import CALIBRATION
from gradmap_hub.pruning.candidates import lowest, lowest_window
from gradmap_hub.pruning.scores import LayerScores
from gradmap_hub.pruning.scoring import score_layers

MIXTURE = "mixture"


class Sums:
    """Scores of a growing number of sequences, in every variant; `readings` returns variant -> score of each layer."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._scores: list[LayerScores] = []
        # Signed sums of the gradients, for the variant that takes the absolute value last.
        self._gradients: dict[tuple[int, str], Tensor] = {}

    def add(self, row: Tensor) -> None:
        with self._watched():
            self._scores.append(score_layers(self._decoder, row))

    def readings(self) -> dict[str, list[float]]:
        rows = self._scores
        layers = range(self._decoder.count)
        signed = [0.0] * len(layers)
        for (layer, _), total in self._gradients.items():
            signed[layer] += float(total.abs().sum(dtype=torch.float32))
        shares = [[value / math.fsum(row.gradient) for value in row.gradient] for row in rows]
        return {
            "gradient, |.| per row": [math.fsum(row.gradient[layer] for row in rows) for layer in layers],
            "gradient, each row's sum 1": [math.fsum(share[layer] for share in shares) for layer in layers],
            "gradient, |.| of the sum": signed,
            "|W dL/dW| per row": [math.fsum(row.taylor[layer] for row in rows) for layer in layers],
            "block influence": [math.fsum(row.influence[layer] for row in rows) for layer in layers],
        }

    def windows(self, count: int) -> list[float]:
        """Cosine distance across each window of `count` layers."""
        return [math.fsum(values) for values in zip(*(row.windows(count) for row in self._scores), strict=True)]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        decoder = self._decoder

        def backward(
            hidden: Tensor, index: int, gradient: Tensor, reduce: Callable[[str, nn.Parameter], None]
        ) -> Tensor:
            def add_and_reduce(name: str, parameter: nn.Parameter) -> None:
                assert parameter.grad is not None
                if (index, name) in self._gradients:
                    self._gradients[index, name] += parameter.grad
                else:
                    self._gradients[index, name] = parameter.grad.clone()
                reduce(name, parameter)

            return Decoder.backward(decoder, hidden, index, gradient, add_and_reduce)

        decoder.backward = backward  # pyright: ignore
        try:
            yield
        finally:
            del decoder.backward  # restores the class's method


def choices(decoder: Decoder, rows: Tensor, counts: Sequence[int], removals: int) -> dict[tuple[str, int], list[int]]:
    """(variant, number of sequences) -> chosen layers."""
    sums = Sums(decoder)
    found: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows.split(1), start=1):
        sums.add(row)
        if number in counts:
            for reading, scores in sums.readings().items():
                found[reading, number] = lowest(scores, removals)
            start = lowest(sums.windows(removals), 1)[0]
            found["cosine window", number] = list(range(start, start + removals))
            window = lowest_window(sums.readings()["gradient, |.| per row"], removals)
            found["gradient, window", number] = window
    return found


def mean_perplexity(decoder: Decoder, texts: Sequence[Rows], removed: Sequence[int]) -> float:
    """exp of the mean log-perplexity over texts, without compensation."""
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    losses = [math.fsum(decoder.losses(text.ids, kept)) / len(text.ids) for text in texts]
    return math.exp(min(math.fsum(losses) / len(losses), 700.0))


def plot(results: Sequence[dict[str, Any]], layers: int, path: Path) -> None:
    """Top: perplexity against calibration tokens, one panel per text. Bottom: the layers chosen by each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sources = list(dict.fromkeys(entry["text"] for entry in results))
    readings = list(dict.fromkeys(entry["reading"] for entry in results))
    figure, panels = pyplot.subplots(
        2, len(sources), figsize=(5 * len(sources), 11), dpi=110, squeeze=False, height_ratios=(2, 3)
    )  # fmt: skip
    colours = dict(zip(readings, pyplot.get_cmap("tab10").colors, strict=False))  # pyright: ignore
    for column, source in enumerate(sources):
        axes, below = panels[0][column], panels[1][column]
        of_text = [entry for entry in results if entry["text"] == source]
        for reading in readings:
            line = [entry for entry in of_text if entry["reading"] == reading]
            tokens = [entry["rows"] * SEQ_LEN for entry in line]
            axes.plot(tokens, [entry["perplexity"] for entry in line], "o-", color=colours[reading], label=reading)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.sharey(panels[0][0])
        axes.set_title(f"calibrated on {source}")
        axes.set_xlabel("calibration tokens")
        axes.grid(True, alpha=0.2)
        names = []
        for position, entry in enumerate(
            sorted(of_text, key=lambda entry: (readings.index(entry["reading"]), entry["rows"]))
        ):
            names.append(f"{entry['reading']}, {entry['rows'] * SEQ_LEN}")
            below.scatter(
                entry["removed"], [position] * len(entry["removed"]), marker="s", s=28, color=colours[entry["reading"]]
            )  # fmt: skip
        below.set_xlim(-0.7, layers - 0.3)
        below.set_ylim(len(names) - 0.5, -0.5)
        below.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=7)
        below.set_xlabel("layers chosen")
        below.grid(True, axis="x", alpha=0.2)
    panels[0][0].set_ylabel("perplexity on other texts, without compensation")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__)
    parser.add_argument("--layers", type=int, default=7, help="number of layers to remove (default 7)")
    parser.add_argument("--rows", type=int, default=16, help="most sequences of 512 tokens per text (default 16)")
    parser.add_argument("--evaluation", type=int, default=3, help="evaluation sequences per text (default 3)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of all passes")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    decoder, tokenizer, samples = opened(arguments.output, arguments.dtype)
    pools, texts, _ = data(samples, tokenizer, pool=arguments.rows, evaluation=arguments.evaluation, draws=1)
    calibration = {MIXTURE: pools[0]}
    generator = torch.Generator().manual_seed(0)
    for sample in CALIBRATION:
        ids = tokenize(read_text(samples[sample.name]), tokenizer, SEQ_LEN).ids
        calibration[Path(sample.name).stem] = ids[torch.randperm(len(ids), generator=generator)[: arguments.rows]]
    counts = [1 << power for power in range(arguments.rows.bit_length()) if 1 << power <= arguments.rows]
    known: dict[tuple[int, ...], float] = {}
    results: list[dict[str, Any]] = []
    for text, rows in calibration.items():
        for (reading, number), removed in choices(decoder, rows, counts, arguments.layers).items():
            if tuple(removed) not in known:
                known[tuple(removed)] = mean_perplexity(decoder, texts, removed)
            perplexity = known[tuple(removed)]
            results.append(
                {"text": text, "reading": reading, "rows": number, "removed": removed, "perplexity": perplexity}
            )
            print(json.dumps(results[-1]), flush=True)
    (arguments.output / "stability.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, decoder.count, arguments.output / "stability.png")
    table = Table("calibrated on", "score", *(f"{count * SEQ_LEN} tokens" for count in counts), "layers (most tokens)")
    for text in calibration:
        for reading in dict.fromkeys(entry["reading"] for entry in results):
            line = [entry for entry in results if (entry["text"], entry["reading"]) == (text, reading)]
            shown = [f"{entry['perplexity']:.4g}" for entry in line]
            table.add_row(text, reading, *shown, ranges(line[-1]["removed"]))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
