"""`python -m benchmarks.memory`: peak memory of scoring against depth, for a model streamed from disk.

A random Llama with the shape of Llama-3-8B is written once, in bfloat16, tensor by tensor; shallower models share its
files and have their own config. For each depth a fresh process scores all layers, computes the held-out loss of one
candidate set and, at the smallest depth, writes the pruned checkpoint. Memory is RssAnon, the memory that the process
allocated. Mapped pages of the weight files (RssFile) belong to the page cache, which the kernel frees under pressure;
they are reported separately.

`--in-memory FOLDER` measures pruning in memory on a real checkpoint instead: the peak relative to the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.layout import WEIGHTS_INDEX
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.streaming import open_streamed
from gradmap_hub.pruning.writing import PlannedTensor, write_pruned, write_safetensors

_LLAMA = ARCHITECTURES["llama"]
_STORED = torch.bfloat16
_SAMPLING_SECONDS = 0.05
_PIECE = 1 << 24


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Weight matrices of one layer, by their name within it."""
        head = self.hidden // self.heads
        return {
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (self.kv_heads * head, self.hidden),
            "self_attn.v_proj.weight": (self.kv_heads * head, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "mlp.gate_proj.weight": (self.feed_forward, self.hidden),
            "mlp.up_proj.weight": (self.feed_forward, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.feed_forward),
        }

    @property
    def layer_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices.values()) + 2 * self.hidden

    def parameters(self, layers: int) -> int:
        return layers * self.layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden


@dataclass(frozen=True)
class Phase:
    """Seconds and peaks in bytes. `baseline`: RssAnon at the start; `peak_both`: peak of RssAnon + RssFile."""

    seconds: float
    baseline: int
    peak_anon: int
    peak_file: int
    peak_both: int


@dataclass(frozen=True)
class Measured:
    """The result for one depth; memory in bytes. `baseline`: RssAnon after all imports, before the model is opened."""

    depth: int
    parameters: int
    weight_bytes: int
    dtype: str
    tokens: int
    seconds: float
    baseline: int
    peak_anon: int
    peak_file: int
    peak_rss: int
    loss: float
    phases: dict[str, Phase]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--layers", default="4,8,16,32", help="depths to measure; the largest is the depth on disk")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute dtype")
    parser.add_argument("--output", type=Path, default=Path("build/memory"))
    parser.add_argument("--in-memory", type=Path, metavar="FOLDER", help="measure pruning in memory on this checkpoint")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        result = _measure(arguments.measure, arguments.rows, arguments.tokens, arguments.dtype, arguments.write)
        print(json.dumps(asdict(result)))
    elif arguments.in_memory:
        print(json.dumps(in_memory(arguments.in_memory, arguments.rows, arguments.tokens), indent=2))
    else:
        streamed(arguments)


def streamed(arguments: argparse.Namespace) -> None:
    """Write the model if it is missing, measure each depth in its own process, print and plot."""
    depths = sorted({int(depth) for depth in arguments.layers.split(",")})
    shape = Shape(
        depths[-1], arguments.hidden, arguments.feed_forward, arguments.heads, arguments.kv_heads, arguments.vocabulary
    )
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    original = write_model(output, shape)
    print(expectation(shape, arguments.rows, arguments.tokens, getattr(torch, arguments.dtype)), flush=True)
    results: list[dict[str, Any]] = []
    for depth in depths:
        folder = shallow_copy(original, output / f"depth-{depth}", depth)
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(folder), "--dtype", arguments.dtype]
        command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
        command += ["--write"] if depth == depths[0] else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    name = f"memory-{arguments.dtype}-{arguments.rows}x{arguments.tokens}"
    (output / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, output / f"{name}.png")
    print(table(results))


def write_model(output: Path, shape: Shape) -> Path:
    """Folder of a random model of that shape in `output`, written once; small output projections keep it finite."""
    from transformers import LlamaConfig

    sizes = f"{shape.layers}x{shape.hidden}x{shape.feed_forward}x{shape.heads}x{shape.kv_heads}x{shape.vocabulary}"
    folder = output / f"llama-{sizes}"
    if (folder / "config.json").is_file():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"writing {shape.parameters(shape.layers) / 1e9:.2f} billion parameters to {folder}", flush=True)
    generator = torch.Generator().manual_seed(0)
    small = 0.02 / math.sqrt(2 * shape.layers)

    def normal(name: str, rows: int, columns: int, std: float) -> PlannedTensor:
        def pieces() -> Iterator[Tensor]:
            for start in range(0, rows * columns, _PIECE):
                count = min(_PIECE, rows * columns - start)
                yield torch.empty(count).normal_(0, std, generator=generator)

        return PlannedTensor(name, (rows, columns), pieces)

    def gain(name: str) -> PlannedTensor:
        return PlannedTensor(name, (shape.hidden,), lambda: [torch.ones(shape.hidden)])

    planned = [normal("model.embed_tokens.weight", shape.vocabulary, shape.hidden, 0.02)]
    for index in range(shape.layers):
        prefix = f"model.layers.{index}."
        for name, (rows, columns) in shape.matrices.items():
            std = small if name.startswith(("self_attn.o_proj", "mlp.down_proj")) else 0.02
            planned.append(normal(prefix + name, rows, columns, std))
        planned += [gain(prefix + "input_layernorm.weight"), gain(prefix + "post_attention_layernorm.weight")]
    planned += [gain("model.norm.weight"), normal("lm_head.weight", shape.vocabulary, shape.hidden, 0.02)]
    write_safetensors(folder, planned, _STORED)
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rope_theta=500_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    print(f"written in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def shallow_copy(original: Path, folder: Path, depth: int) -> Path:
    """Make `folder` a model of the first `depth` layers of `original`; weight files are linked, not copied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in original.glob("*.safetensors"):
        (folder / path.name).symlink_to(path.resolve())
    index_file = original / WEIGHTS_INDEX
    if index_file.is_file():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        kept = {name: shard for name, shard in index["weight_map"].items() if _layer_of(name) < depth}
        (folder / WEIGHTS_INDEX).write_text(json.dumps({**index, "weight_map": kept}), encoding="utf-8")
    return folder


def _layer_of(name: str) -> int:
    head, _, rest = name.partition("model.layers.")
    return -1 if head or not rest else int(rest.partition(".")[0])


def expectation(shape: Shape, rows: int, tokens: int, dtype: torch.dtype) -> str:
    """Expected time and memory of the deepest model, from FLOP counts and the measured speed of one matrix product."""
    speed = _matmul_speed(tokens, shape, dtype)
    count = rows * tokens
    layers = shape.layers * shape.layer_parameters
    head = shape.vocabulary * shape.hidden
    # 2 FLOP per token and weight forward; scoring: forward, recomputation, both gradients. The head needs one gradient.
    scoring = count * (8 * layers + 4 * head)
    held_out = count * 2 * (layers + head)
    itemsize = dtype.itemsize
    conversion = 0 if dtype == _STORED else shape.layer_parameters * itemsize
    largest = max(r * c for r, c in shape.matrices.values())
    stream = rows * (shape.layers + 1) * tokens * shape.hidden * itemsize
    logits = 3 * tokens * shape.vocabulary * 4
    memory = conversion + 2 * largest * itemsize + stream + logits + 8 * tokens * shape.feed_forward * itemsize
    return (
        f"expected at {shape.layers} layers: {scoring / 1e12:.1f} TFLOP to score {count} tokens and "
        f"{held_out / 1e12:.1f} TFLOP for the held-out loss; at {speed / 1e9:.0f} GFLOP/s in {dtype} (measured) "
        f"{(scoring + held_out) / speed:.0f} s; {shape.parameters(shape.layers) * 2 / 1e9:.1f} GB read three times; "
        f"{memory / 1e9:.2f} GB over the baseline: converted layer {conversion / 1e9:.2f}, two gradients "
        f"{2 * largest * itemsize / 1e9:.2f}, residual stream {stream / 1e9:.2f}, three times the logits "
        f"{logits / 1e9:.2f}, activations of one layer {8 * tokens * shape.feed_forward * itemsize / 1e9:.2f}"
    )


def _matmul_speed(tokens: int, shape: Shape, dtype: torch.dtype) -> float:
    """FLOP/s of one sequence through an MLP matrix."""
    left = torch.ones(tokens, shape.hidden, dtype=dtype)
    right = torch.ones(shape.feed_forward, shape.hidden, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        torch.nn.functional.linear(left, right)
        seconds.append(time.monotonic() - started)
    return 2 * tokens * shape.hidden * shape.feed_forward / min(seconds)


class Sampler:
    """Samples this process's memory every 50 ms in a thread and keeps the peaks of each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.baseline = memory()[0]
        self.baseline_both = sum(memory())
        self._peak = (0, 0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            self._sample()

    def _sample(self) -> None:
        anon, file = memory()
        self._peak = (max(self._peak[0], anon), max(self._peak[1], file), max(self._peak[2], anon + file))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started, before = time.monotonic(), memory()[0]
        self._peak = (0, 0, 0)
        self._sample()
        yield
        self._sample()
        self.phases[name] = Phase(time.monotonic() - started, before, *self._peak)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def memory() -> tuple[int, int]:
    """RssAnon and RssFile of this process in bytes."""
    values = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            values[name] = int(rest.split()[0]) * 1024
    return values["RssAnon"], values["RssFile"]


def _measure(folder: Path, rows: int, tokens: int, dtype: str, write: bool) -> Measured:
    """Measure one depth in this process."""
    import accelerate  # noqa: F401 - part of the baseline
    import transformers.models.llama.modeling_llama  # noqa: F401

    from gradmap_hub.pruning.scoring import score_layers

    sampler = Sampler()
    with sampler.phase("open"):
        decoder = open_streamed(folder, _LLAMA, tokens, dtype=getattr(torch, dtype))
    vocabulary: int = decoder.model.config.vocab_size  # pyright: ignore
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    with sampler.phase("score"):
        scores = score_layers(decoder, ids)
    lowest = sorted(range(decoder.count), key=lambda layer: scores.gradient[layer])[: decoder.count // 4]
    with sampler.phase("held-out loss"):
        losses = decoder.losses(ids, [layer for layer in range(decoder.count) if layer not in lowest])
    if not all(math.isfinite(value) for value in (*scores.gradient, *scores.taylor, *losses)):
        raise SystemExit("a score or a loss is not finite, so the measurement is meaningless")
    if write:
        pruned = folder.parent / "pruned"
        with sampler.phase("write"):
            write_pruned(folder, pruned, _LLAMA, lowest, {}, _STORED)
        shutil.rmtree(pruned)
    sampler.stop()
    phases = sampler.phases
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    return Measured(
        depth=decoder.count,
        parameters=parameters,
        weight_bytes=parameters * _STORED.itemsize,
        dtype=dtype,
        tokens=ids.numel(),
        seconds=sum(phase.seconds for phase in phases.values()),
        baseline=sampler.baseline,
        peak_anon=max(phase.peak_anon for phase in phases.values()),
        peak_file=max(phase.peak_file for phase in phases.values()),
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        loss=scores.loss,
        phases=phases,
    )


def in_memory(folder: Path, rows: int, tokens: int) -> dict[str, Any]:
    """Pruning in memory, float32: peak of scoring above the level before loading, in bytes and relative to the weights.

    Mapped pages are counted too: transformers maps weights stored in float32 and copies all others.
    """
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from gradmap_hub.models import decoder as decoder_module
    from gradmap_hub.models.checkpoint import load_model
    from gradmap_hub.models.support import architecture_of
    from gradmap_hub.pruning.scoring import score_layers

    sampler = Sampler()
    with sampler.phase("load"):
        model, _ = load_model(folder)
        config = model.config
        decoder = decoder_module.Decoder(model, architecture_of(config.to_dict()), tokens)
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    before = memory()[0]
    with sampler.phase("score"):
        score_layers(decoder, ids)
    sampler.stop()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    over = sampler.phases["score"].peak_both - sampler.baseline_both
    chunk = min(tokens - 1, decoder_module.LOGIT_CHUNK)
    return {
        "weights": weights,
        "baseline": sampler.baseline_both,
        "loading_over_baseline": sampler.phases["load"].peak_both - sampler.baseline_both,
        "scoring_over_baseline": over,
        "ratio_to_weights": over / weights,
        "allocated_by_scoring": sampler.phases["score"].peak_anon - before,
        "one_chunk_of_logits": chunk * config.vocab_size * 4,
        "residual_stream_of_a_row": (decoder.count + 1) * tokens * config.hidden_size * 4,
        "one_mlp_activation": tokens * config.intermediate_size * 4,
        "attention_scores_of_a_row": config.num_attention_heads * tokens * tokens * 4,
        "seconds": sampler.phases["score"].seconds,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["layers  parameters  weights GB  seconds  baseline GB  peak RssAnon GB  peak RssFile GB  peak RSS GB"]
    for row in results:
        lines.append(
            f"{row['depth']:6d}  {row['parameters'] / 1e9:9.2f}B  {row['weight_bytes'] / 1e9:10.2f}  "
            f"{row['seconds']:7.0f}  {row['baseline'] / 1e9:11.2f}  {row['peak_anon'] / 1e9:15.2f}  "
            f"{row['peak_file'] / 1e9:15.2f}  {row['peak_rss'] / 1e9:11.2f}"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot peak memory and the size of the weights against depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depths = [row["depth"] for row in results]
    for key, label, style in (
        ("weight_bytes", "weights on disk", "--"),
        ("peak_anon", "peak memory allocated (RssAnon)", "-"),
        ("peak_rss", "peak RSS, with mapped file pages", ":"),
    ):
        axes.plot(depths, [row[key] / 1e9 for row in results], style, marker="o", label=label)
    axes.set_xlabel("decoder layers")
    axes.set_ylabel("GB")
    axes.set_ylim(bottom=0)
    axes.set_xticks(depths)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
