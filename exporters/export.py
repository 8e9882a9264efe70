"""`export` writes a checkpoint in any format of `gradmap_hub.formats` and checks the file against PyTorch.

- `onnx`: Optimum's graph, float32 (onnx/model.onnx), for transformers.js and Optimum.
- `genai`: GenAI's graph, float32 (onnx/model_genai.onnx).
- `fp16`, for GPUs, and `int8`, `int4`, weight-only: from GenAI's graph if its builder supports the model, else from
  Optimum's.

The float32 graphs and the PyTorch reference are computed once and shared by all formats through the folder `work`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.errors import UsageError
from gradmap_hub.exporters import genai, onnx
from gradmap_hub.exporters.gate import GateResult
from gradmap_hub.exporters.graph import files_of
from gradmap_hub.exporters.inputs import Inputs, Rows, base_of, run_worker
from gradmap_hub.exporters.recipes import GPTQ, LADDERS, LEAST_BLOCK, Recipe
from gradmap_hub.exporters.writers import WRITERS
from gradmap_hub.files import usual_mode
from gradmap_hub.formats import FORMATS, ONNX, Format, graph_names, preferred
from gradmap_hub.models.architectures import dimension
from gradmap_hub.progress import Reporter, SilentReporter

# The files of a tokenizer that GenAI reads.
GENAI_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Try:
    """One recipe, the size of its file and the result of its check. `perplexity_ratio`: perplexity divided by the
    checkpoint's; None if the graph did not run."""

    recipe: str
    settings: dict[str, Any]
    bytes: int
    perplexity_ratio: float | None
    check: GateResult


@dataclass(frozen=True)
class Exported:
    """`files`: names in the destination folder, empty if nothing passed. `base`: what the file was made from, "genai",
    "optimum" or "checkpoint". `settings`: of the chosen recipe. `tries`: all recipes tried, in order. `note`: a
    sentence for the user."""

    format: str
    files: list[str]
    bytes: int
    base: str
    settings: dict[str, Any]
    check: GateResult
    tries: list[Try] = field(default_factory=list)
    note: str = ""


def require(name: str, config: Mapping[str, Any]) -> None:
    """Check, before any expensive work, that a model with this config.json can be written in the format.

    Raises:
        UsageError: the format is unknown or does not support this model.
        MissingExtra: a package is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"Cannot export to {name!r}; formats: {', '.join(FORMATS)}.")
    reason = supported(name, config)
    if reason is not None:
        raise UsageError(
            f"This model cannot be exported to {name}: {reason}.",
            hint="Leave it out; --no-onnx writes only safetensors." if name == ONNX else None,
        )
    base = base_of(FORMATS[name], config)
    if base == "genai":
        genai.require()
    elif base == "optimum" or FORMATS[name].limits is not None:
        onnx.require()


def supported(name: str, config: Mapping[str, Any]) -> str | None:
    """The reason why a model with this config.json cannot be written in the format, or None. Checked before pruning."""
    unsupported = {"genai": genai.unsupported, "optimum": onnx.unsupported}.get(base_of(FORMATS[name], config))
    reason = None if unsupported is None else unsupported(config)
    if reason is None and name in LADDERS and (dimension(config, "hidden_size") or 0) % LEAST_BLOCK:
        reason = f"its hidden size is not a multiple of {LEAST_BLOCK}"
    return reason


def export(
    name: str,
    checkpoint: Path,
    destination: Path,
    *,
    rows: Rows,
    work: Path,
    fit: Rows | None = None,
    optimum: Path | None = None,
    keep_failing: bool = False,
    for_genai: bool = True,
    reporter: Reporter | None = None,
) -> Exported:
    """Write format `name` into the folder `destination` and check it against the checkpoint.

    Args:
        checkpoint: Folder of the safetensors checkpoint.
        rows: Held-out token ids for perplexity, (sequences, tokens) int64.
        work: Folder that caches the float32 graph and the PyTorch reference for the next format; see `clear`.
        fit: Other token ids to fit the rounding on, (sequences, tokens) int64; None: recipes with GPTQ use SEARCH.
        optimum: Optimum's graph of the same checkpoint, if it exists.
        keep_failing: Keep the best file even if it does not pass.
        for_genai: Write the configuration and the tokenizer files that ONNX Runtime GenAI needs beside its graphs.

    A file that does not pass is deleted, as is an earlier file of the same name; the result contains the reason.

    Raises:
        UsageError, MissingExtra: see `require`.
        VerificationError: the float32 graph could not be built.
    """
    require(name, json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    row = FORMATS[name]
    for file in [file for name in graph_names(row) for file in files_of(destination / name)]:
        file.unlink()
    inputs = Inputs(checkpoint, work, rows, fit, optimum)
    with _partial(destination) as partial:
        if name in LADDERS:
            exported = _export_by_recipes(row, inputs, partial, destination, keep_failing, reporter or SilentReporter())
        else:
            exported = _export_by_writer(row, inputs, partial, destination, keep_failing)
    if for_genai:
        _write_genai_files(destination, inputs)
    return exported


def clear(work: Path) -> None:
    """Remove the cache that `export` keeps for the next format."""
    shutil.rmtree(work, ignore_errors=True)


def _export_by_writer(row: Format, inputs: Inputs, partial: Path, destination: Path, keep_failing: bool) -> Exported:
    """Write a format without recipes and check it."""
    path = partial / row.file
    WRITERS[row.name](inputs, path)
    result = inputs.check(path, row)
    size = sum(file.stat().st_size for file in files_of(path))
    kept = _install(path, destination) if result.passed or keep_failing else []
    note = "" if result.passed else _failure(row, result, bool(kept))
    settings = {"precision": row.precision}
    return Exported(row.name, kept, size if kept else 0, inputs.base_of(row), settings, result, note=note)


def _export_by_recipes(
    row: Format, inputs: Inputs, partial: Path, destination: Path, keep_failing: bool, reporter: Reporter
) -> Exported:
    """Try the recipes of a format until one passes."""
    tries: list[Try] = []
    best: Path | None = None
    for number, recipe in enumerate(LADDERS[row.name]):
        folder = partial / str(number)
        folder.mkdir()
        tried = _try(row, recipe, inputs, folder / row.file)
        if tried is None:
            continue
        better = _ratio(tried) < min((_ratio(entry) for entry in tries), default=math.inf)
        tries.append(tried)
        reporter.note(_summary(tried))
        if better or tried.check.passed:
            if best is not None:
                shutil.rmtree(best.parent)
            best = folder / row.file
        else:
            shutil.rmtree(folder)
        if tried.check.passed:
            break
    winner = tries[-1] if tries[-1].check.passed else min(tries, key=_ratio)
    kept: list[str] = []
    if best is not None and (winner.check.passed or keep_failing):
        also = run_worker("alias", {"graph": str(best), "name": row.alias}) if row.alias else []
        kept = _install(best, destination) + also
    note = "" if winner.check.passed else _failure(row, winner.check, bool(kept))
    size, base = winner.bytes if kept else 0, inputs.base_of(row)
    return Exported(row.name, kept, size, base, winner.settings, winner.check, tries, note)


def _try(row: Format, recipe: Recipe, inputs: Inputs, path: Path) -> Try | None:
    """Quantise with one recipe and check the result; None if the recipe does not apply to these weights."""
    hessians = inputs.hessians() if recipe.rounding == GPTQ else None
    done = run_worker(
        "quantized",
        {
            "base": str(inputs.float32()),
            "destination": str(path),
            "recipe": dataclasses.asdict(recipe),
            "hessians": None if hessians is None else str(hessians),
        },
    )
    if done is None:
        return None
    settings = dataclasses.asdict(recipe) | {"rounding": done["rounding"], "matrices_in_8_bits": done["eight_bit"]}
    result = inputs.check(path, row)
    ratio = result.ratio if math.isfinite(result.ratio) else None
    return Try(recipe.name, settings, done["bytes"], ratio, result)


def _ratio(tried: Try) -> float:
    return math.inf if tried.perplexity_ratio is None else tried.perplexity_ratio


def _summary(tried: Try) -> str:
    if tried.perplexity_ratio is None:
        return f"{tried.recipe}: {tried.check.reason}"
    change = (tried.perplexity_ratio - 1) * 100
    verdict = "passes" if tried.check.passed else "does not pass"
    return f"{tried.recipe}: {tried.bytes / 1e6:.1f} MB, perplexity {change:+.1f} %, {verdict}"


def _failure(row: Format, result: GateResult, kept: bool) -> str:
    advice = f" {row.advice}" if row.advice else ""
    fate = "The file is kept, as requested." if kept else "The file was deleted."
    return f"{row.name} does not pass its check: {result.reason}. {fate}{advice}"


@contextlib.contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination, on the same file system; always removed."""
    folder = destination.with_name(destination.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(path: Path, destination: Path) -> list[str]:
    """Move a graph and the files beside it into place, the graph last, so that a visible graph can be loaded."""
    destination.mkdir(exist_ok=True)
    files = files_of(path)
    beside = sorted(file for file in path.parent.iterdir() if file.is_file() and file not in files)
    for file in (*beside, *reversed(files)):
        os.replace(file, destination / file.name)
    return [file.name for file in files]


def _write_genai_files(destination: Path, inputs: Inputs) -> None:
    """Write genai_config.json, which names the graph to load: the preferred one on a CPU, and the tokenizer's files
    beside it, where GenAI looks for them. Remove them if no graph comes from GenAI's builder. GenAI loads the other
    graphs with a configuration overlay."""
    path = destination / genai.CONFIG
    for file in (path, *(destination / name for name in GENAI_TOKENIZER)):
        file.unlink(missing_ok=True)
    source = inputs.genai_config()
    candidates = [row.file for row in preferred() if row.base in ("genai", "either") and row.on_cpu is not None]
    present = [file for file in candidates if (destination / file).is_file()]
    if source is None or not present:
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = present[0]
    if config["model"].get("eos_token_id") is None:  # the builder takes it from config.json alone, and GenAI needs one
        config["model"]["eos_token_id"] = inputs.end_token()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path.chmod(usual_mode())
    for name in GENAI_TOKENIZER:
        if (inputs.checkpoint / name).is_file():
            shutil.copyfile(inputs.checkpoint / name, destination / name)
