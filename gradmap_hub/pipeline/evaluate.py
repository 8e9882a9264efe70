"""`evaluate`: a finished folder and its original on the same rows, the same documents, the same machine, in turn.

Every result is a stage of its own with its own inputs (weights, rows, documents), so that what was measured once is not
measured again, whatever else is asked for besides. One model is in memory at a time; only where speed is measured are
all of them, to take turns. Nothing in the folder changes here.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gradmap_hub import __version__
from gradmap_hub.config import EvaluateConfig
from gradmap_hub.data.texts import check_text_files, is_local_text, text_of
from gradmap_hub.errors import CalibrationError, SourceError, UsageError
from gradmap_hub.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, PYTORCH, ROUNDS
from gradmap_hub.evaluation.staleness import data_file, folder_sha256
from gradmap_hub.layout import folder_sizes, sha256_of, work_folder
from gradmap_hub.machine import hardware, versions
from gradmap_hub.measurements import (
    BeforeAfter,
    Contamination,
    FilePerplexity,
    Measured,
    MeasuredFile,
    MeasuredMetric,
    MeasuredSpeed,
    MeasuredTask,
    MeasuredText,
    Sample,
)
from gradmap_hub.models.original import OriginalModel
from gradmap_hub.models.safetensors_files import read_config
from gradmap_hub.models.source import Source, find_source
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.recorded import find_contamination
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord
from gradmap_hub.stage_cache import Stages
from gradmap_hub.units import size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.evaluation.metrics import Compared
    from gradmap_hub.evaluation.speed import Backend
    from gradmap_hub.evaluation.tasks import TaskResult
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.decoder import Decoder

T = TypeVar("T")

ORIGINAL, PRUNED = "original", "pruned"
SAMPLE_TOKENS = 48
SPEED_BATCH = 8


@dataclass(frozen=True)
class _Losses:
    """Mean NLL of each row."""

    rows: list[float]


@dataclass(frozen=True)
class _Written:
    texts: list[str]


def evaluate_stages(folder: Path, config: EvaluateConfig, *, reporter: Reporter, hub: Hub) -> RunRecord:
    """The record of `folder` with what was measured; it is not written.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    evaluation = _Evaluation(folder, config, reporter, hub)
    measured = evaluation.measure()
    evaluation.clear()
    return dataclasses.replace(evaluation.record, measured=measured, measured_note="")


class _Models:
    """The two models, one of them in memory at a time."""

    def __init__(self, folders: Mapping[str, Path], source: Source, tokens: int, precision: tuple[Any, str]) -> None:
        self.folders = folders
        self._architecture = source.architecture
        self._tokens = tokens
        self._precision = precision
        self._open: tuple[str, Decoder] | None = None

    def load(self, which: str) -> Any:
        from gradmap_hub.models.checkpoint import load_model

        dtype, device = self._precision
        return load_model(self.folders[which], dtype)[0].to(device)

    def decoder(self, which: str) -> Decoder:
        if self._open is None or self._open[0] != which:
            from gradmap_hub.models.decoder import Decoder

            self.close()
            self._open = which, Decoder(self.load(which), self._architecture, self._tokens)
        return self._open[1]

    def close(self) -> None:
        self._open = None
        gc.collect()


class _Evaluation:
    """One evaluation: what it is of, and what of it is on disk already."""

    def __init__(self, folder: Path, config: EvaluateConfig, reporter: Reporter, hub: Hub) -> None:
        """Everything that can be wrong is looked at here, cheapest first.

        Raises:
            GradmapError: see `evaluate_stages`.
        """
        self.folder, self.config, self.reporter, self.hub = folder, config, reporter, hub
        self.record = RunRecord.read(folder)
        check_text_files(config.text)
        self.tasks = self._tasks()
        settings = read_config(folder / "config.json")
        longest = settings.get("max_position_embeddings")
        if isinstance(longest, int) and config.seq_len > longest:
            raise UsageError(f"--seq-len is {config.seq_len}; this model reads at most {longest} tokens.")
        model = config.against or self.record.base.repo_id
        if model is None:
            raise SourceError(
                f"{folder} was made from a local model, {self.record.base.name}.",
                hint="Say where it is with --against.",
            )
        source = find_source(model, self.record.base.commit if config.against is None else None, hub)
        if source.layer_count != self.record.layers_before:
            raise SourceError(
                f"{model} has {source.layer_count} layers; {folder} was made from a model of "
                f"{self.record.layers_before}.",
                hint="Give its original with --against.",
            )
        self.source = source
        self.work = work_folder(folder)
        self.work.mkdir(parents=True, exist_ok=True)
        self.original = OriginalModel(source, hub, self.work)
        self.texts = self._rows()
        self.precision = self._precision()

    def _tasks(self) -> tuple[str, ...]:
        if not self.config.tasks:
            return ()
        from gradmap_hub.evaluation import tasks as harness

        names = harness.chosen(self.config.tasks)
        harness.check(names, self.config.tasks_from)
        return names

    def _precision(self) -> tuple[Any, str]:
        from gradmap_hub.models.decoder import choose_precision

        both = {self.source.base.dtype, self.record.dtype}
        return choose_precision("auto", "auto", "bfloat16" if both == {"bfloat16"} else "float32", streamed=False)

    def _rows(self) -> list[Rows]:
        """The rows of every text: all of them, or as many as were asked for, spread evenly.

        Raises:
            CalibrationError: a text is too short, or is given twice.
            SourceError: the two models have different tokenizers.
        """
        from gradmap_hub.data.rows import Rows, tokenize

        self.reporter.start("Reading text")
        tokenizer = self.original.tokenizer()
        if self._tokenizer().get_vocab() != tokenizer.get_vocab():
            raise SourceError(
                f"{self.source.base.name} has another vocabulary than {self.folder}: it is not its original.",
                hint="Give its original with --against.",
            )
        found: list[Rows] = []
        for source in self.config.text:
            rows = tokenize(text_of(source, self.hub), tokenizer, self.config.seq_len)
            if len(rows.ids) < 2:
                raise CalibrationError(
                    f"The text {rows.name} is too short: at least two rows of {self.config.seq_len} tokens are needed.",
                    hint="Give a longer text, or shorter rows with --seq-len.",
                )
            if rows.sha256 in (other.sha256 for other in found):
                raise CalibrationError(f"The text {rows.name} is given twice.")
            step = max(1, len(rows.ids) // self.config.rows)
            found.append(Rows(rows.name, rows.sha256, rows.ids[::step][: self.config.rows]))
        self.reporter.finish(", ".join(f"{rows.ids.numel():,} tokens of {rows.name}" for rows in found))
        return found

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise SourceError(f"The tokenizer of {self.folder} cannot be loaded: {first}") from error

    # -- the story -----------------------------------------------------------------------------------------------------

    def measure(self) -> Measured:
        contamination = self._contamination()
        self.reporter.start(f"Fetching {self.source.base.name}")
        original = self.original.checkpoint()
        self.reporter.finish(size(sum(path.stat().st_size for path in original.glob("*.safetensors"))))
        self.reporter.start("Summing the weights")
        sums = self.sums = {ORIGINAL: folder_sha256(original), PRUNED: folder_sha256(self.folder)}
        self.reporter.finish(f"pruned {sums[PRUNED][:12]}")
        self._check_original(sums[ORIGINAL])
        self.models = _Models(
            {ORIGINAL: original, PRUNED: self.folder}, self.source, self.config.seq_len, self.precision
        )
        references = [self._reference(rows) for rows in self.texts]
        written = {ORIGINAL: self._write(ORIGINAL)}
        results = {ORIGINAL: [self._task(ORIGINAL, name) for name in self.tasks]}
        compared = [self._compare(rows) for rows in self.texts]
        written[PRUNED] = self._write(PRUNED)
        results[PRUNED] = [self._task(PRUNED, name) for name in self.tasks]
        self.models.close()
        files = self._files(compared)
        from gradmap_hub.models.checkpoint import checkpoint_bytes
        from gradmap_hub.space.app import EXAMPLES

        return Measured(
            gradmap_hub=__version__,
            weights_sha256=sums[PRUNED],
            original=self.source.base.name,
            original_commit=self.source.base.commit,
            original_sha256=sums[ORIGINAL],
            bytes=BeforeAfter(checkpoint_bytes(original), checkpoint_bytes(self.folder)),
            precision=str(self.precision[0]).removeprefix("torch."),
            texts=[
                _text(rows, reference.rows, found, shared)
                for rows, reference, found, shared in zip(self.texts, references, compared, contamination, strict=True)
            ],
            tasks=[self._compared_task(*pair) for pair in zip(results[ORIGINAL], results[PRUNED], strict=True)],
            files=files,
            speed=self._costs(files) if self.config.speed else [],
            samples=[Sample(*texts) for texts in zip(EXAMPLES, written[ORIGINAL], written[PRUNED], strict=True)],
            harness=_harness_version() if self.tasks else None,
            settings=self._settings(),
            versions=versions(),
            hardware=hardware() if self.precision[1] == "cpu" else f"{hardware()}, {self.precision[1]}",
        )

    def _settings(self) -> dict[str, Any]:
        import torch

        config = self.config
        return {
            "text": [rows.name for rows in self.texts],
            "seq_len": config.seq_len,
            "rows": config.rows,
            "tasks": list(self.tasks),
            "limit": config.limit,
            "threads": torch.get_num_threads(),
            "speed": {
                "prompt": self._prompt_tokens(),
                "new_tokens": NEW_TOKENS,
                "rounds": ROUNDS,
            }
            if config.speed
            else None,
        }

    def _check_original(self, found: str) -> None:
        """A word where the original is known and this is another."""
        base, source = self.record.base, self.source.base
        moved = base.commit is not None and source.commit not in (None, base.commit)
        if moved or (base.weights_sha256 is not None and source.commit is None and found != base.weights_sha256):
            self.reporter.note(f"{source.name} is not the original of the record: its weights are others.")

    def _stage(
        self,
        name: str,
        title: str,
        kind: type[T],
        compute: Callable[[], T],
        *,
        models: Sequence[str],
        inputs: Mapping[str, Any],
        describe: Callable[[T], str] = lambda _: "",
    ) -> T:
        """A stage that depends on these models and inputs, and on no other stage."""
        identity = {
            "version": __version__,
            "what": "evaluate",
            "precision": [str(value) for value in self.precision],
            **{which: self.sums[which] for which in models},
        }
        stages = Stages(self.work, self.reporter, identity)
        return stages.run(f"evaluate-{name}", title, kind, compute, inputs=inputs, describe=describe)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _reference(self, rows: Rows) -> _Losses:
        """Measure the original, and keep what the pruned model will be compared with."""
        from gradmap_hub.evaluation.metrics import perplexity

        return self._stage(
            f"{ORIGINAL}-text-{_short(rows)}",
            f"Original on {rows.name}",
            _Losses,
            lambda: _Losses(self._keep_states(rows)),
            models=[ORIGINAL],
            inputs=_row_inputs(rows),
            describe=lambda found: f"perplexity {perplexity(found.rows):.2f}",
        )

    def _keep_states(self, rows: Rows) -> list[float]:
        from gradmap_hub.evaluation.metrics import reference_states

        decoder = self.models.decoder(ORIGINAL)
        self.reporter.total(len(rows.ids))
        losses, states = reference_states(decoder, rows.ids, self.reporter.advance)
        _save({"states": states}, self._states_file(rows))
        head = {name: value.detach().cpu() for name, value in decoder.output.state_dict().items()}
        _save(head, self._head_file())
        return losses

    def _compare(self, rows: Rows) -> Compared:
        from gradmap_hub.evaluation.metrics import Compared, compare_rows, perplexity

        def compute() -> Compared:
            states, head = self._states(rows)
            decoder = self.models.decoder(PRUNED)
            self.reporter.total(len(rows.ids))
            return compare_rows(decoder, rows.ids, states, head, self.reporter.advance)

        return self._stage(
            f"{PRUNED}-text-{_short(rows)}",
            f"Pruned on {rows.name}",
            Compared,
            compute,
            models=[ORIGINAL, PRUNED],
            inputs=_row_inputs(rows),
            describe=lambda found: f"perplexity {perplexity(found.losses):.2f}",
        )

    def _states(self, rows: Rows) -> tuple[Tensor, nn.Linear]:
        """The original's final states on these rows (rows, tokens, d) and its output embedding."""
        import torch
        from safetensors.torch import load_file

        if not (self._states_file(rows).is_file() and self._head_file().is_file()):
            self._keep_states(rows)  # an earlier evaluation cleared them
        states = load_file(self._states_file(rows))["states"]
        parts = load_file(self._head_file())
        count, width = parts["weight"].shape
        head = torch.nn.Linear(width, count, bias="bias" in parts, device="meta")
        head.load_state_dict(parts, assign=True)
        return states, head.requires_grad_(False)

    def _states_file(self, rows: Rows) -> Path:
        import hashlib

        key = repr((self.sums[ORIGINAL], _row_inputs(rows), self.precision))
        return self.work / f"evaluate-states-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _head_file(self) -> Path:
        return self.work / f"evaluate-head-{self.sums[ORIGINAL][:16]}.safetensors"

    def clear(self) -> None:
        """The states are large, and what was wanted of them is known; those of a run that was killed go as well."""
        for path in (*self.work.glob("evaluate-states-*"), *self.work.glob("evaluate-head-*")):
            path.unlink(missing_ok=True)

    # -- samples and tasks ---------------------------------------------------------------------------------------------

    def _write(self, which: str) -> list[str]:
        from gradmap_hub.space.app import EXAMPLES

        def compute() -> _Written:
            from gradmap_hub.evaluation.speed import Eager

            model: Any = self.models.decoder(which).model
            backend = Eager(model)
            self.reporter.total(len(EXAMPLES))
            texts: list[str] = []
            for prompt in EXAMPLES:
                texts.append(self._greedy(backend, prompt, _ends(model)))
                self.reporter.advance()
            return _Written(texts)

        return self._stage(
            f"{which}-samples",
            f"{which.capitalize()} answers {len(EXAMPLES)} prompts",
            _Written,
            compute,
            models=[which],
            inputs={"prompts": EXAMPLES, "tokens": SAMPLE_TOKENS},
        ).texts

    def _greedy(self, backend: Backend, prompt: str, ends: set[int]) -> str:
        tokenizer = self.original.tokenizer()
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt)["input_ids"]
        backend.read(ids)
        answer: list[int] = []
        while len(answer) < SAMPLE_TOKENS and (token := backend.write()) not in ends:
            answer.append(token)
        return tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _task(self, which: str, name: str) -> TaskResult:
        from gradmap_hub.evaluation import tasks as harness

        documents = self.config.tasks_from
        file = None if documents is None else documents / harness.TASKS[name].file

        def compute() -> TaskResult:
            model: Any = self.models.decoder(which).model
            return harness.run_tasks(
                model,
                self.original.tokenizer(),
                [name],
                documents=documents,
                limit=self.config.limit,
                started=self.reporter.total,
                advanced=self.reporter.advance,
            )[name]

        def in_words(found: TaskResult) -> str:
            main = found.metric(harness.TASKS[name].main)
            return f"{main.name} {main.value:.3f} on {found.documents:,} documents"

        return self._stage(
            f"{which}-{name}",
            f"{which.capitalize()} on {name}",
            harness.TaskResult,
            compute,
            models=[which],
            inputs={
                "limit": self.config.limit,
                "documents": sha256_of(file) if file else None,
                "harness": harness.harness_version(),
            },
            describe=in_words,
        )

    def _compared_task(self, original: TaskResult, pruned: TaskResult) -> MeasuredTask:
        from gradmap_hub.evaluation import tasks as harness
        from gradmap_hub.evaluation.metrics import difference_interval

        if original.sha256 != pruned.sha256:
            raise SourceError(
                f"The documents of {original.name} changed between the two models.",
                hint="Run the same command again.",
            )
        metrics = []
        for before in original.metrics:
            after = pruned.metric(before.name)
            counted = bool(before.per_document)
            metrics.append(
                MeasuredMetric(
                    before.name,
                    before.value,
                    after.value,
                    difference_interval(before.per_document, after.per_document) if counted else [],
                    100 * after.value / before.value if counted and before.value else None,
                )
            )
        task = harness.TASKS[original.name]
        return MeasuredTask(
            name=original.name,
            version=original.version,
            dataset=original.dataset,
            config=original.config,
            split=original.split,
            source=original.dataset if self.config.tasks_from is None else task.file,
            documents=original.documents,
            total=original.total,
            sha256=original.sha256,
            main=task.main,
            metrics=metrics,
        )

    # -- ONNX files, speed and memory ----------------------------------------------------------------------------------

    def _files(self, compared: Sequence[Compared]) -> list[MeasuredFile]:
        """Every ONNX file on the rows of every text."""
        from gradmap_hub.evaluation.metrics import perplexity, ratio_interval

        if importlib.util.find_spec("onnxruntime") is None:
            self.reporter.note(
                "ONNX files are left out: ONNX Runtime is not installed (pip install 'gradmap-hub[cpu]')."
            )
            return []
        from gradmap_hub.runtime import available_artifacts

        found: list[MeasuredFile] = []
        for artifact in available_artifacts(folder_sizes(self.folder)):
            graph = self.folder / artifact.path
            data = data_file(graph)
            sums = sha256_of(graph), sha256_of(data) if data else ""
            entries = []
            for rows, checkpoint in zip(self.texts, compared, strict=True):
                losses = self._graph_losses(artifact.path, rows, sums)
                interval = ratio_interval(checkpoint.losses, losses)
                entries.append(FilePerplexity(rows.name, perplexity(losses), interval))
            found.append(MeasuredFile(artifact.path, artifact.bytes, *sums, entries))
        return found

    def _graph_losses(self, path: str, rows: Rows, sums: tuple[str, str]) -> list[float]:
        from gradmap_hub.evaluation.metrics import perplexity

        def compute() -> _Losses:
            from gradmap_hub import runtime

            model = runtime.load(self.folder, artifact=path, context=self.config.seq_len)
            self.reporter.total(len(rows.ids))
            found: list[float] = []
            for row in rows.ids.tolist():
                found.append(float(model.losses(row).mean()))
                self.reporter.advance()
            return _Losses(found)

        return self._stage(
            f"{Path(path).stem}-text-{_short(rows)}",
            f"{path} on {rows.name}",
            _Losses,
            compute,
            models=[],
            inputs={**_row_inputs(rows), "graph": sums},
            describe=lambda found: f"perplexity {perplexity(found.rows):.2f}",
        ).rows

    def _prompt_tokens(self) -> int:
        return min(PROMPT_TOKENS, self.config.seq_len)

    def _costs(self, files: Sequence[MeasuredFile]) -> list[MeasuredSpeed]:
        """Speed and memory of both models in PyTorch and of every ONNX file."""
        from gradmap_hub.evaluation.costs import Peaks, Runnable, Speeds, memory, speed

        backends = [Runnable(which, PYTORCH, batch) for which in (ORIGINAL, PRUNED) for batch in (1, SPEED_BATCH)]
        backends += [Runnable(PRUNED, entry.path, 1) for entry in files]
        prompt = self.texts[0].ids[0, : self._prompt_tokens()].tolist()
        sums = [(entry.path, entry.sha256, entry.data_sha256) for entry in files]
        inputs = {"backends": backends, "files": sums, "hardware": hardware(), **self._speed_settings()}
        both = [ORIGINAL, PRUNED]
        peaks = self._stage(
            "memory",
            "Memory, each in a process of its own",
            Peaks,
            lambda: memory(backends, self.models.folders, len(prompt), self.precision, self.reporter),
            models=both,
            inputs=inputs,
        )
        speeds = self._stage(
            "speed",
            f"Speed, {ROUNDS} rounds in turn",
            Speeds,
            lambda: speed(backends, self.models.load, self.folder, prompt, self.reporter),
            models=both,
            inputs=inputs,
        )
        return [
            dataclasses.replace(entry, memory=peak) for entry, peak in zip(speeds.entries, peaks.bytes, strict=True)
        ]

    def _speed_settings(self) -> dict[str, int]:
        import torch

        return {
            "prompt": self._prompt_tokens(),
            "new_tokens": NEW_TOKENS,
            "rounds": ROUNDS,
            "threads": torch.get_num_threads(),
        }

    def _contamination(self) -> list[Contamination]:
        """Per text, its rows that share words with the calibration rows."""
        texts = self.config.text
        self.reporter.start("Comparing with the calibration text")
        found = find_contamination(
            self.record,
            self.texts,
            self.original.tokenizer(),
            [self.folder, Path.cwd(), *(Path(text).expanduser().parent for text in texts if is_local_text(text))],
            hub=self.hub,
            reporter=self.reporter,
            online=self.source.base.commit is not None or not all(map(is_local_text, texts)),
        )
        checked = [entry.rows for entry in found if entry.rows is not None]
        self.reporter.finish(f"{sum(checked)} rows share 13 words in a row with it" if checked else "not checked")
        return found


def _text(rows: Rows, reference: Sequence[float], found: Compared, shared: Contamination) -> MeasuredText:
    from gradmap_hub.evaluation.metrics import mean_interval, perplexity, ratio_interval

    return MeasuredText(
        name=rows.name,
        sha256=rows.sha256,
        rows=len(rows.ids),
        tokens=rows.ids.numel(),
        sequence_length=rows.ids.shape[1],
        original=perplexity(reference),
        pruned=perplexity(found.losses),
        interval=ratio_interval(reference, found.losses),
        agreement=sum(found.agreement) / len(found.agreement),
        agreement_interval=mean_interval(found.agreement),
        divergence=sum(found.divergence) / len(found.divergence),
        divergence_interval=mean_interval(found.divergence),
        contamination=shared,
    )


def _row_inputs(rows: Rows) -> dict[str, Any]:
    from gradmap_hub.data.rows import sha256_of_ids

    return {"rows": sha256_of_ids(rows.ids), "shape": list(rows.ids.shape)}


def _short(rows: Rows) -> str:
    return rows.sha256[:8]


def _ends(model: Any) -> set[int]:
    """The token ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def _harness_version() -> str:
    from gradmap_hub.evaluation.tasks import harness_version

    return harness_version()


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)  # whole or not there


def evaluate_folder(
    folder: Path, config: EvaluateConfig | None = None, *, reporter: Reporter | None = None, hub: Hub | None = None
) -> RunRecord:
    """Measure a pruned folder and its original on the same text, tasks and machine. Record and card are rewritten once
    all results are known.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    hub, reporter = connect(hub, reporter)
    folder = folder if folder.name else folder.resolve()  # "." has no folder beside it
    record = evaluate_stages(folder, config or EvaluateConfig(), reporter=reporter, hub=hub)
    return write_results(record, folder, reporter)
