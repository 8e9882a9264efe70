"""Tasks of lm-evaluation-harness on a model in memory, zero-shot, with its own definitions, prompts and metrics. The
documents are from the Hub or from a folder.

Results keep one value per document, so that two models can be compared on the same documents.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gradmap_hub.errors import CalibrationError, MissingExtra, SourceError, UsageError
from gradmap_hub.units import reason_of

# Sequences per pass; the float32 log-probabilities of a batch take most of the memory.
BATCH = 8
# The filter of the harness for tasks that name none.
_FILTER = "none"


@dataclass(frozen=True)
class Task:
    """A task of the harness. `definition`: path in the harness' tasks; `split`: the split evaluated; `main`: the main
    metric, acc_norm if the task has it; `keys`: required in every document."""

    name: str
    definition: str
    split: str
    main: str
    keys: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of the file with the documents in a local folder."""
        return f"{self.name}.{self.split}.jsonl"


_CHOICES = ("choices", "answerKey")
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "super_glue/boolq/default.yaml", "validation", "acc", ("question", "passage", "label")),
        Task("piqa", "piqa/piqa.yaml", "validation", "acc_norm", ("goal", "sol1", "sol2", "label")),
        Task(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            "validation",
            "acc_norm",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ),
        Task(
            "winogrande", "winogrande/default.yaml", "validation", "acc", ("sentence", "option1", "option2", "answer")
        ),
        Task("arc_easy", "arc/arc_easy.yaml", "test", "acc_norm", ("question", *_CHOICES)),
        Task("arc_challenge", "arc/arc_challenge.yaml", "test", "acc_norm", ("question", *_CHOICES)),
        Task("openbookqa", "openbookqa/openbookqa.yaml", "test", "acc_norm", ("question_stem", *_CHOICES)),
        Task("lambada_openai", "lambada/lambada_openai.yaml", "test", "acc", ("text",)),
        Task("wikitext", "wikitext/wikitext.yaml", "test", "word_perplexity", ("page",)),
    )
}
# The tasks of the paper: `--tasks paper`.
PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Metrics that are means over documents of 0 or 1.
ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class MetricResult:
    """A metric of a task. `value`: as the harness aggregates it; `per_document`: for accuracies, in the order of
    documents, else empty."""

    name: str
    value: float
    per_document: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Standard error of the mean over documents."""
        return statistics.stdev(self.per_document) / math.sqrt(len(self.per_document))


@dataclass(frozen=True)
class TaskResult:
    """One model on one task. `documents` of `total` were used; `sha256`: of these documents with their prompts and
    targets, in order; `dataset`, `config`, `split`: the source that the harness uses."""

    name: str
    version: str
    dataset: str
    config: str | None
    split: str
    documents: int
    total: int
    sha256: str
    metrics: list[MetricResult]

    def metric(self, name: str) -> MetricResult:
        return next(metric for metric in self.metrics if metric.name == name)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The named tasks, each once; `paper` stands for the tasks of PAPER.

    Raises:
        UsageError: an unknown task.
    """
    wanted = [task for name in names for task in (PAPER if name == "paper" else (name,))]
    strange = next((name for name in wanted if name not in TASKS), None)
    if strange is not None:
        raise UsageError(f"Unknown task {strange!r}; the tasks are paper (seven of them), {', '.join(TASKS)}.")
    return tuple(dict.fromkeys(wanted))


def check(names: Sequence[str], documents: Path | None) -> None:
    """Check the tasks before a model is loaded.

    Raises:
        MissingExtra: the harness is not installed.
        CalibrationError: documents are missing, too few, or lack a key that the task reads.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("Tasks of lm-evaluation-harness", "eval")
    if documents is None:
        return
    absent = [TASKS[name].file for name in names if not (documents / TASKS[name].file).is_file()]
    if absent:
        raise CalibrationError(
            f"{documents} does not contain {', '.join(absent)}.",
            hint="--tasks-from takes a folder of NAME.SPLIT.jsonl, one document per line. Leave those tasks out, or "
            "leave --tasks-from out to fetch them from the Hub.",
        )
    for name in names:
        _check_documents(documents / TASKS[name].file, TASKS[name])


def _check_documents(path: Path, task: Task) -> None:
    count = 0
    # Not splitlines(): it also splits at other characters, which JSON strings may contain.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise CalibrationError(f"{path} line {number} is not a JSON object.")
        if lacking := [key for key in task.keys if key not in document]:
            raise CalibrationError(f"{path} line {number} has no {lacking[0]!r}, which {task.name} reads.")
        count += 1
    if count < 2:
        raise CalibrationError(f"{path} holds {count} documents; at least 2 are needed.")


def harness_version() -> str:
    return version("lm-eval")


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    documents: Path | None = None,
    limit: int | None = None,
    started: Callable[[int], None] = lambda _sequences: None,
    advanced: Callable[[int], None] = lambda _sequences: None,
) -> dict[str, TaskResult]:
    """Evaluate a model zero-shot: task name -> result.

    Args:
        documents: Folder of the documents, used offline; None: the harness fetches them.
        limit: Only the first N documents of each task.
        started: Called with the number of sequences of each task.
        advanced: Called with the number of sequences of each batch.

    Raises:
        SourceError: the documents cannot be loaded.
    """
    with _quiet(offline=documents is not None), tempfile.TemporaryDirectory(prefix="gradmap-tasks-") as folder:
        write_definitions(Path(folder), names, documents)
        # Imported here because it is optional and takes seconds; Any, because decorators hide its signatures.
        # Its `simple_evaluate` also seeds the generators of the process, and lists the packages of the environment,
        # which takes seconds.
        evaluator: Any = importlib.import_module("lm_eval.evaluator")
        manager: Any = importlib.import_module("lm_eval.tasks")
        result = evaluator.evaluate(
            lm=_language_model(model, tokenizer, started, advanced),
            task_dict=_load(manager.TaskManager(include_path=folder, include_defaults=False), names),
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,  # ours are computed from the documents
        )
    return {name: _result(name, result) for name in names}


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """The tasks with their documents, as the harness evaluates them, zero-shot."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # from datasets, pyarrow, requests or huggingface_hub: no common base class
        raise SourceError(
            f"The documents of {', '.join(names)} cannot be loaded: {reason_of(error, 300)}",
            hint="Check the connection, or give a folder that holds them with --tasks-from.",
        ) from error
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


def _language_model(
    model: nn.Module, tokenizer: Any, started: Callable[[int], None], advanced: Callable[[int], None]
) -> Any:
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")

    class Reporting(huggingface.HFLM):
        """The harness' model with progress."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            del disable_tqdm
            # One-token continuations of the same context share a pass.
            started(len({(*context, *continuation[:-1]) for _, context, continuation in requests}))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            advanced(len(inps))
            return logits

    # A copy, because the harness may set a padding token. Log-probabilities are summed in float32 even for bfloat16
    # models: rounded to three digits, they would select answers by chance.
    return Reporting(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=BATCH,
        softmax_dtype=torch.float32,
    )


def _result(name: str, result: Any) -> TaskResult:
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    summary = hashlib.sha256()
    for sample in samples:
        summary.update("".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")).encode())
    metrics = []
    for key, value in result["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if filter_name != _FILTER or metric.endswith("_stderr"):
            continue
        per_document = [float(sample[metric]) for sample in samples] if metric in ACCURACIES else []
        metrics.append(MetricResult(metric, float(value), per_document))
    dataset, config = _origin(TASKS[name])
    counts = result["n-samples"][name]
    return TaskResult(
        name,
        str(result["versions"][name]),
        dataset,
        config,
        TASKS[name].split,
        int(counts["effective"]),
        int(counts["original"]),
        summary.hexdigest(),
        metrics,
    )


def _own_folder() -> Path:
    """Folder of the harness' task definitions."""
    spec = importlib.util.find_spec("lm_eval.tasks")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _origin(task: Task) -> tuple[str, str | None]:
    """Data set and its configuration (None: the default) in the harness' definition."""

    class Loader(yaml.SafeLoader):
        """Reads `!function` as a string."""

    Loader.add_constructor("!function", lambda _loader, node: node.value)
    path = _own_folder() / task.definition
    found: dict[str, Any] = {}
    included: str | None = path.name
    while included is not None:
        with (path.parent / included).open(encoding="utf-8") as stream:
            read = yaml.load(stream, Loader)
        found = read | found
        included = read.get("include")
    return str(found["dataset_path"]), found.get("dataset_name")


def write_definitions(folder: Path, names: Sequence[str], documents: Path | None) -> None:
    """Write one definition per task into `folder`, also usable as --include_path of `lm_eval`. It includes the harness'
    definition; with `documents`, it reads these files."""
    own = _own_folder()
    for name in names:
        task = TASKS[name]
        definition: dict[str, Any] = {"include": str(own / task.definition), "task": name}
        if documents is not None:
            definition |= {
                "dataset_path": "json",
                "dataset_name": None,
                # Converted files are deleted with the folder instead of staying in the user's cache.
                "dataset_kwargs": {
                    "data_files": {"test": str((documents / task.file).resolve())},
                    "cache_dir": str(folder / "cache"),
                },
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
            }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def _no_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **(kwargs | {"disable": True}))


@contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """Suppress progress bars and logs below errors, and with `offline` the use of the Hub; then restore everything."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if offline else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    datasets: Any = importlib.import_module("datasets")
    modules = [importlib.import_module(f"lm_eval.{name}") for name in ("api.task", "api.model", "models.huggingface")]
    bars = [getattr(module, "tqdm", None) for module in modules]
    had_bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, bar in zip(modules, bars, strict=True):
        if bar is not None:
            setattr(module, "tqdm", partial(_no_bar, bar))  # noqa: B010
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            if bar is not None:
                setattr(module, "tqdm", bar)  # noqa: B010
        if not had_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
