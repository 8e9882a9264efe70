"""Accuracy on lm-evaluation-harness tasks, for some rows of the table: `python -m benchmarks --accuracy N`.

The harness runs as a library on the model in memory, with the layers temporarily removed and the patch applied.
Prompts and metrics are those of the installed harness; the documents are local files, the network is not used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.inputs import DATA
from benchmarks.methods import (
    CORRECTED,
    DEFAULT,
    DENSE,
    EVERY_DRAW,
    ONE_SHOT,
    OWN,
    PAPER,
    PUBLISHED,
    STAGE_2,
    Cell,
    Work,
    fitted_patch,
    removal_order,
)
from benchmarks.peers import Patch
from gradmap_hub.evaluation import tasks as lm_harness
from gradmap_hub.models.decoder import Decoder

DOCUMENTS = DATA / "tasks"
# Table rows of the first draw that get an accuracy. Methods that collapse (random, last layers, Taylor+) are left out.
ROWS = {(DENSE, PUBLISHED), (DEFAULT, CORRECTED), (PAPER, CORRECTED), (ONE_SHOT, CORRECTED)} | {
    (peer, variant) for peer in (*EVERY_DRAW, "SLEB") for variant in (PUBLISHED, OWN)
}
TASKS = {name: lm_harness.TASKS[name] for name in ("arc_easy", "piqa", "winogrande", "lambada_openai")}


@dataclass(frozen=True)
class Score:
    """Share of correct answers on one task, its standard error over documents, and the number of documents."""

    metric: str
    value: float
    error: float
    documents: int


@dataclass(frozen=True)
class Accuracy:
    """`mean`: unweighted mean over tasks; `error`: its standard error over documents, for these fixed tasks."""

    tasks: dict[str, Score]
    mean: float
    error: float


def accuracy_of(scores: Mapping[str, Score]) -> Accuracy:
    mean = math.fsum(score.value for score in scores.values()) / len(scores)
    error = math.sqrt(math.fsum(score.error**2 for score in scores.values())) / len(scores)
    return Accuracy(dict(scores), mean, error)


def missing(documents: Path = DOCUMENTS) -> str | None:
    """The reason why accuracy cannot be measured, or None."""
    if importlib.util.find_spec("lm_eval") is None:
        return "accuracy is skipped: lm-evaluation-harness is not installed (pip install 'gradmap-hub[eval]')"
    absent = [task.file for task in TASKS.values() if not (documents / task.file).is_file()]
    return f"accuracy is skipped: {', '.join(absent)} not found in {documents}" if absent else None


def measure(
    work: Work, tokenizer: Any, cells: Sequence[Cell], rows: int, documents: Path = DOCUMENTS
) -> dict[tuple[int, str, str], Accuracy]:
    """(count, method, variant) -> accuracy on the first `rows` documents (2 or more) of each task, zero-shot.

    Covers only the cells of `ROWS` on the first draw. Equal sets with equal patches are measured once. Patches are
    not stored; they are fitted again.
    """
    digests = {name: _sha256(documents / task.file)[:16] for name, task in TASKS.items()}
    found: dict[tuple[int, str, str], Accuracy] = {}
    for cell in cells:
        if cell.draw != 0 or (cell.method, cell.variant) not in ROWS:
            continue
        kind, removed = _patch_of(work, cell)
        key = {
            "what": "accuracy",
            "kind": kind,
            "removed": removed,
            "rows": rows,
            "tasks": digests,
            "harness": harness(),
        }
        if kind is not None:
            key["draw"] = cell.draw
        value = work.store.or_compute(key, partial(_compute, work, tokenizer, cell, kind, removed, rows, documents))
        scores = {name: Score(**score) for name, score in value.items()}
        found[cell.count, cell.method, cell.variant] = accuracy_of(scores)
    return found


def harness() -> str:
    return lm_harness.harness_version()


def _patch_of(work: Work, cell: Cell) -> tuple[str | None, list[int]]:
    """The kind of the cell's patch (None: no patch) and its layers, in order of removal if the patch depends on it."""
    if cell.variant == OWN:
        return cell.method, removal_order(work, cell) if cell.method == "Prune&Comp" else sorted(cell.removed)
    if cell.variant == CORRECTED and cell.sites:
        return (STAGE_2 if cell.method == DEFAULT else cell.method), sorted(cell.removed)
    return None, sorted(cell.removed)


def _compute(
    work: Work, tokenizer: Any, cell: Cell, kind: str | None, removed: Sequence[int], rows: int, documents: Path
) -> dict[str, Any]:
    work.say(f"accuracy of {cell.method} {cell.variant}, layers {sorted(removed)} removed")
    patch = Patch() if kind is None else fitted_patch(work.decoder, work.pools[cell.draw], kind, removed)[0]
    with pruned_view(work.decoder, work.kept(removed), patch):
        return run_harness(work.decoder.model, tokenizer, rows, documents)


def run_harness(model: nn.Module, tokenizer: Any, rows: int, documents: Path = DOCUMENTS) -> dict[str, dict[str, Any]]:
    """Task -> fields of its `Score`, for the model in its present state."""
    found = lm_harness.run_tasks(model, tokenizer, list(TASKS), documents=documents, limit=rows)
    scores: dict[str, dict[str, Any]] = {}
    for name, result in found.items():
        metric = result.metric(TASKS[name].main)
        scores[name] = {
            "metric": metric.name,
            "value": metric.value,
            "error": metric.error,
            "documents": result.documents,
        }
    return scores


@contextmanager
def pruned_view(decoder: Decoder, kept: Sequence[int], patch: Patch) -> Iterator[None]:
    """The same model object with only the kept layers and with the patch, equal to `Patch.run`; restored on exit."""
    model: Any = decoder.model
    path, _, name = decoder.architecture.layers.rpartition(".")
    parent = model.get_submodule(path)
    use_cache = model.config.use_cache
    with ExitStack() as stack:
        stack.enter_context(patch.apply(decoder))
        for index in sorted(patch.before):
            # The first kept layer at or after the index, or the final norm.
            entered = next((decoder.layers[layer] for layer in kept if layer >= index), decoder.norm)
            hook = partial(_multiply, patch.before[index])
            stack.callback(entered.register_forward_pre_hook(hook, with_kwargs=True).remove)
        # A single pass needs no KV cache, and without a cache the layer indices need no renumbering.
        stack.callback(setattr, model.config, "use_cache", use_cache)
        model.config.use_cache = False
        stack.callback(setattr, parent, name, decoder.layers)
        setattr(parent, name, nn.ModuleList(decoder.layers[layer] for layer in kept))
        yield


def _multiply(
    matrix: Tensor, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: multiplies the hidden states that enter a module by a matrix."""
    if args:
        return (args[0] @ matrix.to(args[0]), *args[1:]), kwargs
    hidden = kwargs["hidden_states"]
    return args, {**kwargs, "hidden_states": hidden @ matrix.to(hidden)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
