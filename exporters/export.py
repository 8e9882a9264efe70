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
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradmap_hub.errors import UsageError, VerificationError
from gradmap_hub.exporters import gate, genai, onnx
from gradmap_hub.exporters.gate import GateResult
from gradmap_hub.exporters.graph import files_of
from gradmap_hub.exporters.processes import WorkerFailed, call
from gradmap_hub.exporters.recipes import GPTQ, LADDERS, LEAST_BLOCK, Recipe
from gradmap_hub.formats import FORMATS, ONNX, Format
from gradmap_hub.formats import register as register_format
from gradmap_hub.models.architectures import dimension
from gradmap_hub.progress import Reporter, SilentReporter

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Try:
    """One recipe, the size of its file and the result of its check. `perplexity_ratio`: to the checkpoint; None if the
    graph did not run."""

    recipe: str
    settings: dict[str, Any]
    bytes: int
    perplexity_ratio: float | None
    check: GateResult


@dataclass(frozen=True)
class Exported:
    """`files`: names in the destination folder, empty if nothing passed. `base`: source graph, "genai" or "optimum".
    `settings`: of the chosen recipe. `tries`: all recipes tried, in order. `note`: a sentence for the user."""

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
    if name == ONNX or _base_of(name, config) == "optimum":
        onnx.require()
    else:
        genai.require()


def supported(name: str, config: Mapping[str, Any]) -> str | None:
    """The reason why a model with this config.json cannot be written in the format, or None. Checked before pruning."""
    if name == "genai":
        return genai.unsupported(config)
    if _base_of(name, config) == "optimum" and onnx.unsupported(config) is not None:
        return onnx.unsupported(config)
    if name in LADDERS and (dimension(config, "hidden_size") or 0) % LEAST_BLOCK:
        return f"its width is not a multiple of {LEAST_BLOCK}"
    return None


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
    reporter: Reporter | None = None,
) -> Exported:
    """Write format `name` into the folder `destination` and check it against the checkpoint.

    Args:
        rows: held-out tokens (rows, tokens) for perplexity.
        work: caches the float32 graph and the PyTorch reference for the next format; remove it with `clear`.
        fit: separate tokens (rows, tokens) to fit the rounding on.
        optimum: Optimum's export of the same checkpoint, if it exists.
        keep_failing: keep the best file even if it does not pass.

    A file that does not pass is deleted, and so is an earlier file of the same name; the result contains the reason.

    Raises:
        UsageError, MissingExtra: see `require`.
        VerificationError: the float32 graph could not be built.
    """
    reporter = reporter or SilentReporter()
    require(name, json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    _remove(destination, name)
    shared = Shared(checkpoint, work, rows, fit, optimum)
    with _partial(destination) as partial:
        if name in LADDERS:
            exported = _export_quantised(name, shared, partial, destination, keep_failing, reporter)
        else:
            exported = _export_float(name, shared, partial, destination, keep_failing)
    _write_genai_config(destination, shared)
    return exported


def clear(work: Path) -> None:
    """Remove the cache that `export` keeps for the next format."""
    shutil.rmtree(work, ignore_errors=True)


class Shared:
    """Files that all formats of one checkpoint share, each created on first use and cached in `work` under the
    checkpoint's fingerprint."""

    def __init__(self, checkpoint: Path, work: Path, rows: Rows, fit: Rows | None, optimum: Path | None) -> None:
        self.checkpoint = checkpoint
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        sizes = [dimension(self.config, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
        self.layers, width, heads = (value or 0 for value in sizes)
        self.head_size = int(self.config.get("head_dim") or width // heads)
        self._optimum = optimum
        self._rows, self._fit = rows, fit
        self.folder = work / _fingerprint(checkpoint, rows, fit)
        if not self.folder.is_dir():
            clear(work)  # it belongs to another checkpoint
            self.folder.mkdir(parents=True)

    @property
    def kind(self) -> str:
        return _base_of("int8", self.config)

    def base(self) -> Path:
        """The float32 graph."""
        if self.kind == "genai":
            folder = self.folder / "genai"
            return folder / genai.MODEL if folder.is_dir() else genai.build(self.checkpoint, folder)
        return self.optimum()

    def optimum(self) -> Path:
        """Optimum's graph."""
        if self._optimum is not None:
            return self._optimum
        path = self.folder / "optimum" / onnx.MODEL
        if not path.is_file():
            onnx.export_onnx(self.checkpoint, path.parent)
        return path

    def rows(self) -> Path:
        return self._saved("rows.npy", self._rows)

    def hessians(self) -> Path | None:
        """The folder that `calibrate` writes; None without sequences to fit on, or if it would be too large."""
        folder = self.folder / "hessians"
        if self._fit is None or folder.is_dir():
            return folder if folder.is_dir() else None
        partial = self.folder / "hessians.partial"
        shutil.rmtree(partial, ignore_errors=True)
        fit = self._saved("fit.npy", self._fit)
        arguments = {"base": str(self.base()), "rows": str(fit), "destination": str(partial)}
        if not _called("calibrate", {**arguments, "head_size": self.head_size}):
            return None
        partial.rename(folder)
        return folder

    def check(self, graph: Path, name: str) -> GateResult:
        return gate.check(graph, self._reference(), self.rows(), self.layers, self.head_size, FORMATS[name].limits)

    def _reference(self) -> Path:
        path = self.folder / "reference.npz"
        if not path.is_file():
            partial = self.folder / "partial.npz"
            arguments = {"checkpoint": str(self.checkpoint), "rows": str(self.rows()), "destination": str(partial)}
            _called("reference", arguments)
            os.replace(partial, path)
        return path

    def _saved(self, name: str, rows: Rows) -> Path:
        path = self.folder / name
        if not path.is_file():
            np.save(path, np.ascontiguousarray(rows, np.int64))
        return path


# Writes the graph of one format to a path, with what lies beside it.
Writer = Callable[["Shared", Path], None]


def _write_optimum(shared: Shared, path: Path) -> None:
    for file in onnx.file_names(shared.optimum().parent):
        _link(file, path.with_name(file.name))


def _write_genai(shared: Shared, path: Path) -> None:
    _called("graph", {"source": str(shared.base()), "destination": str(path)})


def _write_half(shared: Shared, path: Path) -> None:
    _called("half", {"base": str(shared.base()), "destination": str(path)})


# Of the formats that are written in one way; int8 and int4 have recipes instead (recipes.LADDERS).
_WRITERS: dict[str, Writer] = {ONNX: _write_optimum, "genai": _write_genai, "fp16": _write_half}


def register(row: Format, write: Writer) -> None:
    """Add a format: its row, and the function that writes its graph.

    Raises:
        ValueError: its name or its file is taken.
    """
    register_format(row)
    _WRITERS[row.name] = write


def unregister(name: str) -> None:
    """Take a registered format out again."""
    del FORMATS[name], _WRITERS[name]


def _export_float(name: str, shared: Shared, partial: Path, destination: Path, keep_failing: bool) -> Exported:
    """Write the graph of a format without recipes and check it."""
    path = partial / FORMATS[name].file
    _WRITERS[name](shared, path)
    result = shared.check(path, name)
    size = sum(file.stat().st_size for file in files_of(path))
    kept = _install(path, destination) if result.passed or keep_failing else []
    note = "" if result.passed else _failure(name, result, bool(kept))
    base = "optimum" if name == ONNX else shared.kind
    precision = "float16" if name == "fp16" else "float32"
    return Exported(name, kept, size if kept else 0, base, {"precision": precision}, result, note=note)


def _export_quantised(
    name: str, shared: Shared, partial: Path, destination: Path, keep_failing: bool, reporter: Reporter
) -> Exported:
    """Try the recipes until one passes."""
    tries: list[Try] = []
    best: Path | None = None
    for number, recipe in enumerate(LADDERS[name]):
        folder = partial / str(number)
        folder.mkdir()
        tried = _try(name, recipe, shared, folder / FORMATS[name].file)
        if tried is None:
            continue
        better = _ratio(tried) < min((_ratio(entry) for entry in tries), default=math.inf)
        tries.append(tried)
        reporter.note(_summary(tried))
        if better or tried.check.passed:
            if best is not None:
                shutil.rmtree(best.parent)
            best = folder / FORMATS[name].file
        else:
            shutil.rmtree(folder)
        if tried.check.passed:
            break
    winner = tries[-1] if tries[-1].check.passed else min(tries, key=_ratio)
    kept = _install(best, destination) if best is not None and (winner.check.passed or keep_failing) else []
    note = "" if winner.check.passed else _failure(name, winner.check, bool(kept))
    return Exported(name, kept, winner.bytes if kept else 0, shared.kind, winner.settings, winner.check, tries, note)


def _try(name: str, recipe: Recipe, shared: Shared, path: Path) -> Try | None:
    """Quantise with one recipe and check the result; None if the recipe does not apply to these weights."""
    hessians = shared.hessians() if recipe.rounding == GPTQ else None
    done = _called(
        "quantized",
        {
            "base": str(shared.base()),
            "destination": str(path),
            "recipe": dataclasses.asdict(recipe),
            "hessians": None if hessians is None else str(hessians),
        },
    )
    if done is None:
        return None
    settings = dataclasses.asdict(recipe) | {"rounding": done["rounding"], "matrices_in_8_bits": done["eight_bit"]}
    result = shared.check(path, name)
    ratio = result.ratio if math.isfinite(result.ratio) else None
    return Try(recipe.name, settings, done["bytes"], ratio, result)


def _called(module: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return call(module, arguments)
    except WorkerFailed as error:
        raise VerificationError(
            f"The export failed ({module}): {error}", hint="The pruned checkpoint is complete; leave this format out."
        ) from error


def _ratio(tried: Try) -> float:
    return math.inf if tried.perplexity_ratio is None else tried.perplexity_ratio


def _summary(tried: Try) -> str:
    if tried.perplexity_ratio is None:
        return f"{tried.recipe}: {tried.check.reason}"
    change = (tried.perplexity_ratio - 1) * 100
    verdict = "passes" if tried.check.passed else "does not pass"
    return f"{tried.recipe}: {tried.bytes / 1e6:.1f} MB, perplexity {change:+.1f} %, {verdict}"


def _failure(name: str, result: GateResult, kept: bool) -> str:
    advice = f" {FORMATS[name].advice}" if FORMATS[name].advice else ""
    fate = "The file is kept, as requested." if kept else "The file was deleted."
    return f"{name} does not pass its check: {result.reason}. {fate}{advice}"


def _base_of(name: str, config: Mapping[str, Any]) -> str:
    return "genai" if name == "genai" or genai.unsupported(config) is None else "optimum"


def _fingerprint(checkpoint: Path, rows: Rows, fit: Rows | None) -> str:
    digest = hashlib.sha256()
    for path in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns} ".encode())
    for ids in (rows, fit):
        digest.update(b"none" if ids is None else np.ascontiguousarray(ids, np.int64).tobytes())
    return digest.hexdigest()[:16]


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


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove(destination: Path, name: str) -> None:
    for file in files_of(destination / FORMATS[name].file):
        file.unlink()


def _write_genai_config(destination: Path, shared: Shared) -> None:
    """Write genai_config.json, which names the graph to load, beside the graphs; remove it if no graph comes from
    GenAI's builder. The other graphs can be loaded with a configuration overlay."""
    path = destination / genai.CONFIG
    path.unlink(missing_ok=True)
    source = shared.folder / "genai" / genai.CONFIG
    ranked = [(row.in_genai_config, row.file) for row in FORMATS.values() if row.in_genai_config is not None]
    present = [file for _, file in sorted(ranked) if (destination / file).is_file()]
    if shared.kind != "genai" or not present or not source.is_file():
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = present[0]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path.chmod(0o644)
