"""The stages of pruning, each resumable: calibrate, pull, score, select, compensate, measure, heal, write, measure.

`prune_stages` calls them in order; the numerics are in the modules named after them. `sweep` calls those up to the
writing for one ratio after another.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import Expected, PruneConfig
from gradmap_hub.data.texts import text_of
from gradmap_hub.errors import CalibrationError, SourceError
from gradmap_hub.layout import COMPANION_FILES, legal_texts, weight_artifacts, weights_sha256, work_folder
from gradmap_hub.machine import hardware, versions
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.models.safetensors_files import check_weights, readable
from gradmap_hub.models.source import Source, identity
from gradmap_hub.progress import Reporter
from gradmap_hub.record import (
    SCHEMA_VERSION,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    HealRecord,
    RunRecord,
    TextPerplexity,
    TextSource,
    VerificationRecord,
)
from gradmap_hub.stage_cache import Stages
from gradmap_hub.units import ranges, size

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor

    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.decoder import Decoder
    from gradmap_hub.pruning.scoring import LayerScores

# Files of the work folder: new values of weights, under "layer:parameter name within the layer".
CORRECTION, HEALED = "correction.safetensors", "healed.safetensors"


class Run:
    """One run: its source, its settings, its stages, and what has been loaded so far."""

    def __init__(
        self,
        source: Source,
        config: PruneConfig,
        removals: int,
        output: Path,
        command: str,
        reporter: Reporter,
        hub: Hub,
        *,
        stages: str = "prune",
        expected: Expected | None = None,
    ) -> None:
        self.source = source
        self.expected = expected or Expected()
        self.config = config
        self.removals = removals
        self.output = output
        self.work = work_folder(output)
        self.command = command
        self.reporter = reporter
        self.hub = hub
        self._converted = self.work / "original"
        self._stand_in = self.work / "readable"
        self._opened: list[Decoder] = []  # none or one; branches share it
        self._tokenizer: Any = None
        self.stages = Stages(self.work, reporter, {"version": __version__, "what": stages, "base": identity(source)})

    def branch(self, name: str, label: str, ratio: float) -> Run:
        """This run going on from here at another ratio: results of its own (see `Stages.branch`), the same model."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, ratio=ratio, layers=None, drop=None)
        other.removals = other.config.removals(self.source.layer_count)
        other.stages = self.stages.branch(name, label)
        other.work = other.stages.folder
        return other

    def companions(self) -> Path:
        """A local folder with tokenizer, generation config and legal texts."""
        if self.source.gguf is not None:
            return self.checkpoint()
        if self.source.folder is not None:
            return readable(self.source.folder, self._stand_in)
        return readable(self._fetch(["config.json", *self.source.files.companions]), self._stand_in)

    def checkpoint(self) -> Path:
        """A local folder with config, safetensors weights and companions, checked to be whole."""
        if self.source.folder is not None:
            return readable(self.source.folder, self._stand_in)
        if self.source.gguf is not None:
            if not (self._converted / "tokenizer_config.json").is_file():
                from gradmap_hub.models.gguf import convert_gguf

                convert_gguf(self.source.gguf, self._converted)
            return self._converted
        folder = self._fetch(["config.json", *self.source.files.weights, *self.source.files.companions])
        check_weights(folder, self.source.files)
        return readable(folder, self._stand_in)

    def tokenizer(self) -> Any:
        """The original's tokenizer, loaded when first needed.

        Raises:
            SourceError: it cannot be loaded.
        """
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.companions(), local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise SourceError(f"The tokenizer of {self.source.base.name} cannot be loaded: {first}") from error
        return self._tokenizer

    def decoder(self) -> Decoder:
        """The original model, opened when first needed."""
        if not self._opened:
            self._opened.append(self.open(self.checkpoint()))
        return self._opened[0]

    def open(self, folder: Path) -> Decoder:
        """A checkpoint of this family, in memory or, with --low-memory, left on disk and streamed."""
        dtype, device = self.precision()
        if self.config.low_memory:
            from gradmap_hub.models.streaming import open_streamed

            return open_streamed(folder, self.source.architecture, self.config.seq_len, dtype=dtype)
        from gradmap_hub.models.checkpoint import load_model
        from gradmap_hub.models.decoder import Decoder

        model, _ = load_model(folder, dtype)
        return Decoder(model.to(device), self.source.architecture, self.config.seq_len)

    def precision(self) -> tuple[Any, str]:
        """What is computed in, and on which device.

        Raises:
            UsageError: --compute or --device asks for what model or machine do not have.
        """
        from gradmap_hub.models.decoder import choose_precision

        return choose_precision(
            self.config.compute, self.config.device, self.source.base.dtype, streamed=self.config.low_memory
        )

    def release(self) -> None:
        """Forget the original; what comes next needs the memory."""
        self._opened.clear()
        gc.collect()

    def step(self) -> None:
        self.reporter.advance()

    def _fetch(self, names: Sequence[str]) -> Path:
        assert self.source.base.repo_id and self.source.base.commit
        return self.hub.fetch(self.source.base.repo_id, self.source.base.commit, names)


@dataclass(frozen=True)
class Fetched:
    """`sha256`: of local weights, which no commit names."""

    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Selected:
    """Measured sets, lowest loss first; `by_hand` if the user named the layers and nothing was compared."""

    candidates: list[Candidate]
    by_hand: bool = False


@dataclass(frozen=True)
class Corrected:
    """The set that is lowest after its correction, and what was tried on the way."""

    removed: list[int]
    winner: Candidate | None
    candidates: list[Candidate]
    compensation: CompensationRecord


@dataclass(frozen=True)
class EvaluationText:
    """Rows to measure on. `contaminated`: those that share words with calibration rows; None if not looked at."""

    rows: Rows
    kind: str
    contaminated: list[int] | None = None


@dataclass(frozen=True)
class RowLosses:
    """Per evaluation text, the mean NLL of each row in nats per token."""

    rows: list[list[float]]


@dataclass(frozen=True)
class _BothLosses:
    """The same of the original and of the pruned model before its correction."""

    original: list[list[float]]
    pruned: list[list[float]]


@dataclass(frozen=True)
class _Written:
    verification: VerificationRecord
    parameters: BeforeAfter
    bytes: BeforeAfter
    dtype: str


def prune_stages(run: Run, *, target: str | None = None, license: str | None = None) -> RunRecord:
    from gradmap_hub.pruning.candidates import decide

    run.precision()  # refuses what cannot be, before anything is fetched
    run.output.mkdir(parents=True, exist_ok=True)
    rows, extra = calibrate(run)
    texts = evaluation_texts(run, rows, extra)
    fetched = pull(run)
    scores = score(run, rows)
    chosen = correct(run, rows, select(run, rows, scores))
    compensation = chosen.compensation
    losses = _evaluate_original(run, chosen.removed, [text.rows for text in texts])
    healed = heal_gaps(run, rows, chosen)
    written = _write(run, chosen.removed, compensation, healed)
    compensated = _evaluate_written(run, [text.rows for text in texts])
    winner = chosen.winner
    why = "lowest held-out loss of the candidates" if len(chosen.candidates) > 1 else "lowest score"
    base = dataclasses.replace(run.source.base, weights_sha256=fetched.sha256)
    record = RunRecord(
        schema_version=SCHEMA_VERSION,
        gradmap_hub=__version__,
        command=run.command,
        name=run.output.resolve().name,
        base=base if base.license else dataclasses.replace(base, license=license, license_source="publisher"),
        layers=decide(scores, winner, chosen.removed, why),
        removed=chosen.removed,
        ratio=run.config.ratio if run.config.ratio is not None else run.removals / run.source.layer_count,
        parameters=written.parameters,
        bytes=written.bytes,
        metric=winner.name if winner else "chosen by hand",
        schedule=run.config.schedule,
        calibration=calibration_record(run, rows),
        compensation=compensation,
        seed=run.config.seed,
        candidates=chosen.candidates,
        verification=written.verification,
        evaluation=evaluation_record(run, texts, losses.original, losses.pruned, compensated.rows),
        artifacts=weight_artifacts(run.output),
        target=target,
        dtype=written.dtype,
        versions=versions(),
        timings=dict(run.stages.timings),
        hardware=hardware(),
        heal=healed,
        settings=settings_of(run, rows, extra),
    )
    return record


def settings_of(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> dict[str, Any]:
    """Every option of the run, for `--from`: texts by the names that are published, and what "auto" came to here."""
    dtype, device = run.precision()
    settings = dataclasses.asdict(run.config) | {
        "calibration": [text.name for text in rows.sources],
        "eval_text": [text.name for text in extra],
        "compute": str(dtype).removeprefix("torch."),
        "device": device,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _check_weights_expected(run: Run, fetched: Fetched) -> None:
    expected = run.expected.weights_sha256
    if expected is not None and fetched.sha256 != expected:
        raise SourceError(
            f"{run.source.base.name} is not the original that the record was made from: the sha256 of its weights "
            "differs.",
            hint="Give the folder or file that the first run had, or leave out --from to make another model.",
        )


def calibrate(run: Run) -> tuple[CalibrationRows, list[Rows]]:
    """Tokenise and split the texts. Cheap, so it is done on every run, and before any weight is fetched."""
    from gradmap_hub.data.rows import evaluation_rows, split_rows

    config = run.config
    run.reporter.start("Reading calibration text")
    texts = [text_of(source, run.hub) for source in config.calibration]
    extra_texts = [text_of(source, run.hub) for source in config.eval_text]
    clash = {text.sha256 for text in texts} & {text.sha256 for text in extra_texts}
    if clash:
        name = next(text.name for text in extra_texts if text.sha256 in clash)
        raise CalibrationError(
            f"{name} is given both as calibration and as evaluation text.",
            hint="Rows of the calibration text are held out for evaluation anyway; leave out that --eval-text.",
        )
    tokenizer = run.tokenizer()
    rows = split_rows(
        texts,
        tokenizer,
        seq_len=config.seq_len,
        samples=config.samples,
        selection=config.selection_rows,
        held_out=config.eval_rows,
        seed=config.seed,
    )
    if run.expected.rows_sha256 not in (None, rows.sha256):
        raise CalibrationError(
            "The calibration rows drawn here are not those of the record: text, tokenizer or their versions differ.",
            hint="Use the texts and the versions that the record names, or leave out --from to make another model.",
        )
    extra = [evaluation_rows(text, tokenizer, seq_len=config.seq_len, rows=config.eval_rows) for text in extra_texts]
    run.reporter.finish(f"{rows.fit.numel():,} tokens from {', '.join(text.name for text in texts)}")
    return rows, extra


def _check_contamination(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[list[int]]:
    """Per evaluation text, its rows that share a run of words with a calibration row.

    Raises:
        CalibrationError: that is more than half of a text's rows.
    """
    from gradmap_hub.data.contamination import shared_rows

    if not extra:
        return []
    decode = run.tokenizer().batch_decode
    sources = {source.name: decode(source.ids.tolist()) for source in rows.sources}
    selection = decode(rows.selection.tolist())  # of the same texts; it decided between layers
    found: list[list[int]] = []
    for text in extra:
        words = decode(text.ids.tolist())
        shared = shared_rows(words, (row for group in (*sources.values(), selection) for row in group))
        found.append(shared)
        if not shared:
            continue
        hits = {name: len(shared_rows(words, group)) for name, group in sources.items()}
        worst = max(hits, key=lambda name: hits[name])
        if 2 * len(shared) > len(words):
            raise CalibrationError(
                f"{len(shared)} of the {len(words)} rows of the evaluation text {text.name} share 13 words in a row "
                f"with rows of the calibration text {worst}.",
                hint="Measure on another text, or calibrate on another one: a model looks better on what it was "
                "fitted to.",
            )
        run.reporter.note(
            f"{len(shared)} of the {len(words)} rows of {text.name} share 13 words in a row with calibration rows "
            f"({worst}); the record names them."
        )
    return found


def export_rows(run: Run) -> tuple[Rows, Tensor]:
    """What an export is measured on (text of another source if there is some, else held-out rows of the first text),
    and what it may be fitted on."""
    rows, extra = calibrate(run)
    return (extra or rows.held_out)[0], rows.fit


def inspect_stages(run: Run, ratios: Sequence[float]) -> tuple[LayerScores, dict[float, Candidate]]:
    """Only what `inspect` needs: texts, weights, scores, and at each ratio the better of two rankings."""
    from gradmap_hub.pruning.candidates import candidates
    from gradmap_hub.pruning.search import Search

    rows, _ = calibrate(run)
    scores = score(run, rows)
    run.reporter.start("Measuring what would go")
    counts = {ratio: dataclasses.replace(run.config, ratio=ratio, layers=None).removals(len(scores.layers))
              for ratio in ratios}  # fmt: skip
    run.reporter.total(2 * len(counts) * len(rows.selection))
    choices: dict[float, Candidate] = {}
    for ratio, count in counts.items():
        search = Search(run.decoder(), rows.selection, run.reporter.advance)
        for metric in ("block-influence", "cosine-window"):
            search.loss(candidates(scores, count, metric)[metric], metric)
        choices[ratio] = search.ranked()[0]
    run.reporter.finish(f"{len(counts)} ratios")
    return scores, choices


def pull(run: Run) -> Fetched:
    """Have the weights here."""
    fetched = run.stages.run(
        "pull",
        f"Fetching {run.source.base.name}",
        Fetched,
        lambda: _fetch_weights(run),
        describe=lambda f: size(f.bytes),
    )
    _check_weights_expected(run, fetched)
    return fetched


def _fetch_weights(run: Run) -> Fetched:
    folder = run.checkpoint()
    weights = list(folder.glob("*.safetensors"))
    local = [run.source.gguf] if run.source.gguf else weights if run.source.folder else []
    return Fetched(sum(path.stat().st_size for path in weights), weights_sha256(local) if local else None)


def score(run: Run, rows: CalibrationRows) -> LayerScores:
    from gradmap_hub.pruning.scoring import LayerScores, score_layers

    scoring = rows.fit[: run.config.scoring_rows]

    def compute() -> LayerScores:
        decoder = run.decoder()
        run.reporter.total(len(scoring))
        return score_layers(decoder, scoring, row_done=run.step)

    return run.stages.run(
        "score",
        "Scoring layers",
        LayerScores,
        compute,
        inputs={"rows": rows.sha256, "count": len(scoring), "precision": [str(value) for value in run.precision()]},
        describe=lambda scores: f"{len(scores.layers)} layers, one backward pass over {scoring.numel():,} tokens",
    )


def select(run: Run, rows: CalibrationRows, scores: LayerScores) -> Selected:
    """Form candidate sets from the scores and let the loss on held-out rows decide."""
    from gradmap_hub.data.rows import sha256_of_ids
    from gradmap_hub.pruning.candidates import candidates, stems
    from gradmap_hub.pruning.scoring import iterative_removals
    from gradmap_hub.pruning.search import SWAPS_MEASURED, search_layers

    config = run.config

    def compute() -> Selected:
        decoder = run.decoder()
        grown: dict[str, list[int]] = {}
        if config.drop is not None:
            sets: dict[str, list[int]] = {"chosen by hand": sorted(config.drop)}
        elif config.schedule == "iterative":
            scoring = rows.fit[: config.scoring_rows]
            run.reporter.total(len(scoring) * run.removals)
            sets = {"gradient, iterative": iterative_removals(decoder, scoring, run.removals, row_done=run.step)}
        else:
            sets = candidates(scores, run.removals, config.metric)
            grown = stems(scores, run.removals, config.metric)
        count = len(rows.selection)
        run.reporter.total(count * (len(sets) + (2 if grown else 0) + (SWAPS_MEASURED + 2 if config.swaps else 0)))
        found = search_layers(
            decoder, rows.selection, sets, stems=grown, swaps=config.swaps, rows_done=run.reporter.advance
        )
        return Selected(found, by_hand=config.drop is not None)

    return run.stages.run(
        "select",
        "Choosing layers on held-out rows",
        Selected,
        compute,
        inputs={
            "drop": config.drop,
            "removals": run.removals,
            "metric": config.metric,
            "schedule": config.schedule,
            "swaps": config.swaps,
            "rows": sha256_of_ids(rows.selection),
        },
        describe=lambda found: f"{len(found.candidates)} sets measured, best {ranges(found.candidates[0].removed)}",
    )


def _evaluate_original(run: Run, removed: Sequence[int], texts: Sequence[Rows]) -> _BothLosses:
    def compute() -> _BothLosses:
        run.reporter.total(2 * sum(len(text.ids) for text in texts))
        both = losses_without(run, [(), removed], texts)
        return _BothLosses(both[0], both[1])

    return run.stages.run(
        "evaluate-original",
        "Measuring the original and the pruned model",
        _BothLosses,
        compute,
        inputs=texts_inputs(run, texts),
    )


def losses_without(run: Run, sets: Sequence[Sequence[int]], texts: Sequence[Rows]) -> list[list[list[float]]]:
    """For each of `sets` and each text, the mean NLL (nats per token) of each row in the original as it stands, without
    the layers of that set."""
    decoder = run.decoder()
    kept = [[layer for layer in range(decoder.count) if layer not in removed] for removed in sets]
    measured = [decoder.losses_of(text.ids, kept, run.reporter.advance) for text in texts]
    return [[of_text[index] for of_text in measured] for index in range(len(sets))]


def texts_inputs(run: Run, texts: Sequence[Rows]) -> dict[str, Any]:
    """What makes a measurement on these texts another one."""
    return {"texts": [(text.sha256, len(text.ids)) for text in texts], "seq_len": run.config.seq_len}


def evaluation_texts(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[EvaluationText]:
    """What perplexity is measured on.

    Raises:
        CalibrationError: more than half of the rows of an `extra` text share a run of words with calibration rows.
    """
    contaminated = _check_contamination(run, rows, extra)
    # The held-out rows are of the calibration texts by intention.
    held_out = [EvaluationText(text, "calibration (held out)") for text in rows.held_out]
    return held_out + [
        EvaluationText(text, "another source", shared) for text, shared in zip(extra, contaminated, strict=True)
    ]


def correct(run: Run, rows: CalibrationRows, selected: Selected) -> Corrected:
    """Fit the corrections of the best few sets; the set with the lowest held-out loss after correction goes."""
    correction_file = run.work / CORRECTION

    def compute() -> Corrected:
        from gradmap_hub.pruning.candidates import finalists
        from gradmap_hub.pruning.compensation import compensate_best, with_shift

        correction_file.unlink(missing_ok=True)
        decoder, config = run.decoder(), run.config
        sets = finalists(selected.candidates, config.compensation != "none")
        corrected, place, record, overrides = compensate_best(decoder, rows, sets, config, run.reporter)
        winner = corrected[place]
        record = with_shift(decoder, rows, winner.removed, record, config, run.reporter)
        _save_overrides(overrides, correction_file)
        measured = {tuple(candidate.removed): candidate for candidate in corrected}
        return Corrected(
            winner.removed,
            None if selected.by_hand else winner,
            [] if selected.by_hand else [measured.get(tuple(c.removed), c) for c in selected.candidates],
            record,
        )

    return run.stages.run(
        "compensate",
        "Correcting the drift",
        Corrected,
        compute,
        inputs={"kind": run.config.compensation, "site": run.config.site, "samples": run.config.samples},
        files=lambda: [correction_file],
        describe=lambda found: f"remove {ranges(found.removed)}; {_corrected_in_words(found.compensation)}",
    )


def _corrected_in_words(record: CompensationRecord) -> str:
    if not record.applied:
        return record.reason
    places = ", ".join(f"{entry.layer} {entry.part}" for entry in record.corrections)
    return f"corrected at {places}: held-out loss {record.loss_before:.3f} -> {record.loss_after:.3f}"


def heal_gaps(run: Run, rows: CalibrationRows, chosen: Corrected) -> HealRecord | None:
    """Train the layers around the gaps for a while, if asked for: from the correction on, the original as teacher."""
    if not run.config.heal:
        return None
    healed_file = run.work / HEALED

    def compute() -> HealRecord:
        from gradmap_hub.pruning.heal import heal

        healed_file.unlink(missing_ok=True)
        corrected = _load_overrides(run.work / CORRECTION)
        config, reporter = run.config, run.reporter
        record, overrides = heal(run.decoder(), rows, chosen.removed, corrected, config.heal, config.seed, reporter)
        _save_overrides(overrides, healed_file)
        return record

    return run.stages.run(
        "heal",
        "Healing the layers around the gaps",
        HealRecord,
        compute,
        inputs={"steps": run.config.heal, "seed": run.config.seed},
        files=lambda: [healed_file],
        describe=_healed_in_words,
    )


def _healed_in_words(record: HealRecord) -> str:
    if not record.applied:
        return f"not applied: {record.reason}"
    return (
        f"layers {ranges(record.layers)}, {record.steps} steps: held-out loss {record.loss_before:.3f} -> "
        f"{record.loss_after:.3f}"
    )


def _save_overrides(overrides: Mapping[tuple[int, str], Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({f"{layer}:{name}": value for (layer, name), value in overrides.items()}, path)


def _load_overrides(path: Path) -> dict[tuple[int, str], Any]:
    from safetensors.torch import load_file

    split = {key.partition(":")[::2]: value for key, value in load_file(path).items()}
    return {(int(layer), name): value for (layer, name), value in split.items()}


def new_values(run: Run, compensation: CompensationRecord, healed: HealRecord | None) -> dict[tuple[int, str], Any]:
    """(original layer, parameter name within it) -> what correction and healing made of that parameter."""
    overrides = _load_overrides(run.work / CORRECTION) if compensation.applied else {}
    if healed is not None and healed.applied:  # trained from the corrected values, which these replace
        overrides |= _load_overrides(run.work / HEALED)
    return overrides


def _write(run: Run, removed: Sequence[int], compensation: CompensationRecord, healed: HealRecord | None) -> _Written:
    """Remove the layers, put the corrected and healed weights in, save, read back, compare."""

    def compute() -> _Written:
        from gradmap_hub.models import checkpoint
        from gradmap_hub.pruning.removal import storage_dtype

        source = run.checkpoint()
        dtype = storage_dtype(run.config.dtype, run.source.base.dtype)
        overrides = new_values(run, compensation, healed)
        write = _write_streamed if run.config.low_memory else _write_from_memory
        verification, parameters = write(run, removed, overrides, dtype)
        names = legal_texts(path.name for path in source.iterdir())
        checkpoint.copy_companions(source, run.output, [*COMPANION_FILES, *names])
        return _Written(
            verification,
            parameters,
            BeforeAfter(checkpoint.checkpoint_bytes(source), checkpoint.checkpoint_bytes(run.output)),
            str(dtype).removeprefix("torch."),
        )

    return run.stages.run(
        "write",
        "Writing and verifying the checkpoint",
        _Written,
        compute,
        inputs={"dtype": run.config.dtype},
        files=lambda: [run.output / "config.json", *sorted(run.output.glob("*.safetensors"))],
        describe=lambda written: f"{size(written.bytes.before)} -> {size(written.bytes.after)}, logits read back equal",
    )


def _write_from_memory(
    run: Run, removed: Sequence[int], overrides: Mapping[tuple[int, str], Any], dtype: Any
) -> tuple[VerificationRecord, BeforeAfter]:
    from gradmap_hub.models import checkpoint
    from gradmap_hub.pruning.removal import parameter_count, remove_layers
    from gradmap_hub.pruning.verification import logits_of, probe_ids, verify

    decoder = run.decoder()
    model = decoder.model
    before = parameter_count(model)
    for (layer, name), value in overrides.items():
        decoder.put(layer, {name: value})
    remove_layers(model, run.source.architecture, removed)
    after = parameter_count(model)
    checkpoint.save_checkpoint(model, run.output, dtype)
    checkpoint.cast_parameters(model, _float32())
    expected = logits_of(model.cpu(), probe_ids(model.config))
    run.release()
    del decoder, model
    gc.collect()
    reloaded, report = checkpoint.load_model(run.output)
    return verify(reloaded, report, run.output, expected), BeforeAfter(before, after)


def _write_streamed(
    run: Run, removed: Sequence[int], overrides: Mapping[tuple[int, str], Any], dtype: Any
) -> tuple[VerificationRecord, BeforeAfter]:
    """The same without a model in memory: from file to file, and both ends streamed for the comparison."""
    from gradmap_hub.models.streaming import key_report, open_streamed, pruned_logits
    from gradmap_hub.pruning.removal import parameter_count
    from gradmap_hub.pruning.verification import probe_ids, verify
    from gradmap_hub.pruning.writing import write_pruned

    source, architecture = run.checkpoint(), run.source.architecture
    after = write_pruned(source, run.output, architecture, removed, overrides, dtype)
    written = open_streamed(run.output, architecture, run.config.seq_len, dtype=_float32())
    probe = probe_ids(written.model.config)
    run.release()
    # Rounded as the written file is, so that the two are the same numbers computed in the same precision.
    original = open_streamed(source, architecture, probe.shape[1], dtype=_float32(), rounding=dtype)
    before = parameter_count(original.model)
    for (layer, name), value in overrides.items():
        original.put(layer, {name: value})
    expected = pruned_logits(original, [layer for layer in range(original.count) if layer not in set(removed)], probe)
    with written.whole_model() as model:
        record = verify(model, key_report(run.output), run.output, expected)
    return record, BeforeAfter(before, after)


def _evaluate_written(run: Run, texts: Sequence[Rows]) -> RowLosses:
    """Perplexity of what was written, loaded afresh."""

    def compute() -> RowLosses:
        decoder = run.open(run.output)
        run.reporter.total(sum(len(text.ids) for text in texts))
        return RowLosses([decoder.losses(text.ids, None, run.reporter.advance) for text in texts])

    run.release()
    return run.stages.run("evaluate-written", "Measuring the result", RowLosses, compute)


def evaluation_record(
    run: Run,
    texts: Sequence[EvaluationText],
    original: Sequence[Sequence[float]],
    pruned: Sequence[Sequence[float]],
    compensated: Sequence[Sequence[float]],
) -> EvaluationRecord:
    """Perplexities, from the NLL of each row per text."""
    from gradmap_hub.evaluation.metrics import perplexity, ratio_interval

    measured = [
        TextPerplexity(
            name=text.rows.name,
            kind=text.kind,
            rows=len(text.rows.ids),
            tokens=text.rows.ids.numel(),
            sequence_length=run.config.seq_len,
            sha256=text.rows.sha256,
            original=perplexity(original[index]),
            pruned=perplexity(pruned[index]),
            compensated=perplexity(compensated[index]),
            interval=ratio_interval(original[index], compensated[index]),
            contaminated=text.contaminated,
        )
        for index, text in enumerate(texts)
    ]
    first = measured[0]
    return EvaluationRecord("perplexity", first.original, first.compensated, first.pruned, first.name, measured)


def calibration_record(run: Run, rows: CalibrationRows) -> CalibrationRecord:
    return CalibrationRecord(
        source=", ".join(source.name for source in rows.sources),
        samples=len(rows.fit),
        tokens=rows.fit.numel(),
        sequence_length=run.config.seq_len,
        sha256=rows.sha256,
        scoring_rows=run.config.scoring_rows,
        selection_rows=len(rows.selection),
        texts=[TextSource(source.name, source.sha256, len(source.ids)) for source in rows.sources],
    )


def _float32() -> Any:
    import torch

    return torch.float32
