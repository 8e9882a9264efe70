"""The story, top to bottom: pull, calibrate, score, select, compensate, write, verify, evaluate, export, card, Space,
publish. One call per stage; each stage's result is on disk before the next begins, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.architectures import Architecture, architecture_of
from gradmap_hub.config import PruneConfig, PushConfig
from gradmap_hub.errors import (
    CalibrationError,
    DiskTooSmall,
    LicenseUnknown,
    OutputExists,
    SourceError,
    UsageError,
)
from gradmap_hub.progress import Reporter, SilentReporter
from gradmap_hub.record import (
    SCHEMA_VERSION,
    Artifact,
    Base,
    BeforeAfter,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    Parity,
    RunRecord,
    TextPerplexity,
    TextSource,
    Trial,
    VerificationRecord,
)
from gradmap_hub.source import (
    COMPANION_FILES,
    Files,
    check_weights,
    choose_files,
    folder_sizes,
    legal_texts,
    read_config,
)
from gradmap_hub.stages import Stages

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.calibration import CalibrationRows, Rows
    from gradmap_hub.decoder import Decoder
    from gradmap_hub.hub import Hub, Published
    from gradmap_hub.scoring import LayerScores
    from gradmap_hub.space import SpacePlan

_VERSIONED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "numpy",
)


# -- the three stories ---------------------------------------------------------------------------------------------


def prune(
    model: str,
    output: Path,
    config: PruneConfig,
    *,
    revision: str | None = None,
    resume: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> RunRecord:
    """Prune `model` into the folder `output` (checkpoint, tokenizer, card, gradmap.json)."""
    reporter = reporter or SilentReporter()
    check_output(output, resume)
    source = find_source(model, revision, hub)
    count = config.removals(source.layer_count)
    check_disk(output, source.weight_bytes * 2)
    run = _Run(source, config, count, output, command, reporter, hub)
    return _prune(run)


def push(config: PushConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub) -> PushResult:
    """Prune, export, write card and Space, publish both and verify what was published."""
    reporter = reporter or SilentReporter()
    plan = make_plan(config, hub)
    run = _Run(plan.source, config.prune, plan.removals, plan.output, command, reporter, hub)
    record = _prune(run, target=plan.target, license=config.license)
    if config.onnx:
        record = _export_onnx(run, record)
    record = _write_card(run, record, space=plan.space_target if config.space else None)
    space_folder = _build_space(run, record, plan) if plan.space is not None else None
    return publish_built(plan.output, space_folder, plan, hub, reporter, public=config.public)


def publish_built(
    folder: Path, space_folder: Path | None, plan: Targets, hub: Hub, reporter: Reporter, *, public: bool
) -> PushResult:
    """Publish a built model folder and, if given, its Space folder; then verify both at their commits."""
    from gradmap_hub.hub import SpaceRefused
    from gradmap_hub.space import variables

    record = RunRecord.read(folder)
    message = f"Pruned {record.layers_before} -> {record.layers_after} layers with gradmap-hub {record.gradmap_hub}"
    model = _publish(folder, plan.target, "model", message, hub, reporter)
    space: Published | None = None
    reason = "not asked for"
    if space_folder is not None and plan.space is not None:
        try:
            wanted = variables(record, plan.target, model.commit, plan.space)
            space = _publish(
                space_folder,
                plan.space_target,
                "space",
                "Comparison app by gradmap-hub",
                hub,
                reporter,
                wanted,
            )
        except SpaceRefused as refused:
            reason = f"{refused.message} {refused.hint or ''}".strip()
            reporter.note(f"{reason} The folder: {space_folder}")
    if public:
        hub.make_public(plan.target, "model")
        if space is not None:
            hub.make_public(plan.space_target, "space")
    return PushResult(record, folder, space_folder, model, space, reason)


@dataclass(frozen=True)
class PushResult:
    record: RunRecord
    folder: Path
    space_folder: Path | None
    model: Published
    space: Published | None
    space_reason: str


# -- before any work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model source, judged from its config and listing; no weight has been read. Exactly one of `folder` (local),
    `gguf` (local file) and `base.commit` (Hub) says where the weights are."""

    base: Base
    architecture: Architecture
    layer_count: int
    files: Files
    weight_bytes: int
    parameters: int | None = None
    folder: Path | None = None
    gguf: Path | None = None
    sizes: dict[str, int] = field(default_factory=dict)


def find_source(model: str, revision: str | None, hub: Hub | None) -> Source:
    """Resolve MODEL: an existing .gguf file, an existing folder, or a Hub id. Only config.json is read."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        return _folder_source(path)
    if path.exists():
        raise SourceError(
            f"{model} is neither a folder nor a .gguf file.", hint="Give a Hub id, a folder or a .gguf file."
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise SourceError(f"There is no folder {model}.", hint="Give a Hub id (org/model), a folder or a .gguf file.")
    if hub is None:
        from gradmap_hub.hub import Hub

        hub = Hub()
    remote = hub.model(model, revision)
    if "config.json" not in remote.files:
        raise SourceError(f"{model} has no config.json: it is not a transformers model.", hint="Give another model.")
    config = read_config(hub.fetch(model, remote.commit, ["config.json"]) / "config.json")
    architecture = architecture_of(config)
    files = choose_files(remote.files)
    license_id = remote.card.get("license")
    base = Base(
        name=model,
        repo_id=model,
        revision=revision or "main",
        commit=remote.commit,
        license=str(license_id) if isinstance(license_id, str) else None,
        license_name=remote.card.get("license_name"),
        license_link=remote.card.get("license_link"),
        gated=remote.gated,
        private=remote.private,
        language=_languages(remote.card.get("language")),
        model_type=architecture.model_type,
        dtype=_dtype_of(config),
        has_onnx="onnx/model.onnx" in remote.files,
    )
    return Source(base, architecture, int(config["num_hidden_layers"]), files, files.weight_bytes, sizes=remote.files)


def _folder_source(path: Path) -> Source:
    config = read_config(path / "config.json")
    architecture = architecture_of(config)
    files = choose_files(folder_sizes(path))
    check_weights(path, files)
    base = Base(name=path.resolve().name, model_type=architecture.model_type, dtype=_dtype_of(config))
    return Source(base, architecture, int(config["num_hidden_layers"]), files, files.weight_bytes, folder=path)


def _gguf_source(path: Path) -> Source:
    from gradmap_hub.gguf_source import gguf_config, read_metadata

    metadata = read_metadata(path)
    config = gguf_config(path)
    architecture = architecture_of(config)
    languages = metadata.get("general.languages")
    base = Base(
        name=path.stem,
        license=metadata.get("general.license"),
        language=_languages(languages),
        model_type=architecture.model_type,
        dtype="float32",
    )
    # Dequantised to float32: at most 8 times the bytes of a 4-bit file.
    return Source(
        base,
        architecture,
        int(config["num_hidden_layers"]),
        Files((), (), 0),
        path.stat().st_size * 8,
        gguf=path,
    )


def check_output(output: Path, resume: bool) -> None:
    """Raises OutputExists: the folder holds something, and it is not to be resumed."""
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file.", hint="Choose another --output.")
    if resume or not output.exists() or not any(output.iterdir()):
        return
    ours = _work_folder(output).is_dir()
    raise OutputExists(
        f"The folder {output} is not empty; nothing in it was touched.",
        hint="Add --resume to go on with the run that made it, or choose another folder."
        if ours
        else "Choose another folder.",
    )


def check_disk(output: Path, needed: int) -> None:
    """Raises DiskTooSmall: less free space than `needed` bytes where `output` will be."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskTooSmall(str(place), needed, free)


@dataclass(frozen=True)
class Targets:
    """Where a push goes."""

    target: str
    space_target: str
    space: SpacePlan | None


@dataclass(frozen=True)
class PushPlan(Targets):
    """Everything known before any work: what --dry-run prints."""

    source: Source
    output: Path
    removals: int
    license: str
    disk_bytes: int
    public: bool


def make_plan(config: PushConfig, hub: Hub) -> PushPlan:
    """All checks that need no weights, cheapest first.

    Raises:
        GradmapError: the first thing that would make the push fail later.
    """
    from gradmap_hub.space import plan_space

    if config.trust_remote_code:
        raise UsageError("--trust-remote-code is not available yet: models that need their own code are refused.")
    output = config.output or default_output(config.model, config.prune)
    check_output(output, config.resume)
    account = hub.account()
    source = find_source(config.model, config.revision, hub)
    removals = config.prune.removals(source.layer_count)
    license_id = source.base.license or config.license
    if license_id is None:
        raise LicenseUnknown(
            f"{source.base.name} states no licence, so nothing can be published from it.",
            hint="If you know its licence, state it with --license (an id such as apache-2.0, or other).",
        )
    if config.public and source.base.gated:
        raise UsageError(f"{source.base.name} is gated: what is made from it stays private. Leave out --public.")
    if config.onnx:
        from gradmap_hub.exporters.onnx import require

        require()
    target = config.to or f"{account.name}/{output.resolve().name}"
    space_target = f"{target}-compare"
    hub.check_target(target, account, resuming=config.resume)
    space = None
    if config.space:
        hub.check_target(space_target, account, "space", resuming=config.resume)
        space = plan_space(
            license=license_id,
            gated=source.base.gated,
            private=source.base.private,
            has_onnx=source.base.has_onnx,
            has_repository=source.base.repo_id is not None,
            onnx=config.onnx,
        )
    # Checkpoint and its ONNX, each about the original's size in float32; the original's own ONNX for the Space; and
    # once more what is published, for the fresh copy it is verified against.
    float32 = source.weight_bytes * (2 if source.base.dtype in ("bfloat16", "float16") else 1)
    stored_original = float32 if space is not None and space.original == "space" and config.onnx else 0
    built = source.weight_bytes + (float32 if config.onnx else 0)
    disk = source.weight_bytes + 2 * built + stored_original
    check_disk(output, disk)
    return PushPlan(target, space_target, space, source, output, removals, license_id, disk, config.public)


def default_output(model: str, config: PruneConfig) -> Path:
    """NAME-gradmap-25 in the working folder."""
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    if config.ratio is not None:
        how_much = f"{math.floor(config.ratio * 100 + 0.5)}"
    else:
        how_much = f"{config.layers or len(config.drop or ())}layers"
    return Path(f"{name}-gradmap-{how_much}")


def _work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def space_folder_of(output: Path) -> Path:
    """The Space folder beside a model folder."""
    return output.with_name(output.name + "-space")


# -- pruning -------------------------------------------------------------------------------------------------------


class _Run:
    """One run: its source, its settings, its stages, and what has been loaded so far."""

    def __init__(
        self,
        source: Source,
        config: PruneConfig,
        removals: int,
        output: Path,
        command: str,
        reporter: Reporter,
        hub: Hub | None,
    ) -> None:
        self.source = source
        self.config = config
        self.removals = removals
        self.output = output
        self.work = _work_folder(output)
        self.command = command
        self.reporter = reporter
        self.hub = hub
        self._decoder: Decoder | None = None
        self.stages = Stages(self.work, reporter, {"version": __version__, "base": _identity(source)})

    def companions(self) -> Path:
        """A local folder with tokenizer, generation config and legal texts."""
        if self.source.gguf is not None:
            return self.checkpoint()
        if self.source.folder is not None:
            return self.source.folder
        return self._fetch(["config.json", *self.source.files.companions])

    def checkpoint(self) -> Path:
        """A local folder with config, safetensors weights and companions, checked to be whole."""
        if self.source.folder is not None:
            return self.source.folder
        if self.source.gguf is not None:
            converted = self.work / "original"
            if not (converted / "tokenizer_config.json").is_file():
                from gradmap_hub.gguf_source import convert_gguf

                convert_gguf(self.source.gguf, converted)
            return converted
        folder = self._fetch(["config.json", *self.source.files.weights, *self.source.files.companions])
        check_weights(folder, self.source.files)
        return folder

    def decoder(self) -> Decoder:
        """The original model in float32, loaded when first needed."""
        if self._decoder is None:
            from gradmap_hub.decoder import Decoder
            from gradmap_hub.exporters.checkpoint import load_float32

            model, _ = load_float32(self.checkpoint())
            self._decoder = Decoder(model, self.source.architecture, self.config.seq_len)
        return self._decoder

    def release(self) -> None:
        """Forget the original; what comes next needs the memory."""
        self._decoder = None
        gc.collect()

    def step(self) -> None:
        self.reporter.advance()

    def _fetch(self, names: Sequence[str]) -> Path:
        assert self.hub is not None and self.source.base.repo_id and self.source.base.commit
        return self.hub.fetch(self.source.base.repo_id, self.source.base.commit, names)


@dataclass(frozen=True)
class _Fetched:
    bytes: int


@dataclass(frozen=True)
class _Selected:
    removed: list[int]
    winner: Candidate | None
    candidates: list[Candidate]


@dataclass(frozen=True)
class _Losses:
    """Per evaluation text, the mean NLL of each row."""

    original: list[list[float]]
    pruned: list[list[float]]


@dataclass(frozen=True)
class _Written:
    verification: VerificationRecord
    parameters: BeforeAfter
    bytes: BeforeAfter
    dtype: str


@dataclass(frozen=True)
class _CompensatedLosses:
    rows: list[list[float]]


@dataclass(frozen=True)
class _Exported:
    parity: Parity


def _prune(run: _Run, *, target: str | None = None, license: str | None = None) -> RunRecord:
    from gradmap_hub.selection import decide

    run.output.mkdir(parents=True, exist_ok=True)
    rows, extra = _calibrate(run)
    run.stages.run(
        "pull",
        f"Fetching {run.source.base.name}",
        _Fetched,
        lambda: _pull(run),
        describe=lambda f: _size(f.bytes),
    )
    scores = _score(run, rows)
    selected = _select(run, rows, scores)
    texts = [(row, "calibration (held out)") for row in rows.held_out] + [(row, "another source") for row in extra]
    losses = _evaluate_original(run, selected, [row for row, _ in texts])
    compensation = _compensate(run, rows, selected)
    written = _write(run, selected, compensation)
    compensated = _evaluate_written(run, [row for row, _ in texts])
    winner = selected.winner
    why = "lowest held-out loss of the candidates" if len(selected.candidates) > 1 else "lowest score"
    base = run.source.base
    record = RunRecord(
        schema_version=SCHEMA_VERSION,
        gradmap_hub=__version__,
        command=run.command,
        name=run.output.resolve().name,
        base=dataclasses.replace(base, license=base.license or license),
        layers=decide(scores, winner, selected.removed, why),
        removed=selected.removed,
        ratio=run.config.ratio if run.config.ratio is not None else run.removals / run.source.layer_count,
        parameters=written.parameters,
        bytes=written.bytes,
        metric=winner.name if winner else "chosen by hand",
        schedule=run.config.schedule,
        calibration=_calibration_record(run, rows),
        compensation=compensation,
        seed=run.config.seed,
        candidates=selected.candidates,
        verification=written.verification,
        evaluation=_evaluation_record(run, texts, losses, compensated),
        artifacts=_weight_artifacts(run.output),
        target=target,
        dtype=written.dtype,
        versions=_versions(),
        timings=dict(run.stages.timings),
        hardware=f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
    )
    return _write_card(run, record)


def _calibrate(run: _Run) -> tuple[CalibrationRows, list[Rows]]:
    """Tokenise and split the texts. Cheap, so it is done on every run, and before any weight is fetched."""
    from transformers import AutoTokenizer

    from gradmap_hub.calibration import evaluation_rows, read_text, split_rows

    config = run.config
    run.reporter.start("Reading calibration text")
    texts = [text for source in config.calibration for text in _texts(run, source, read_text)]
    extra_texts = [text for source in config.eval_text for text in _texts(run, source, read_text)]
    clash = {text.sha256 for text in texts} & {text.sha256 for text in extra_texts}
    if clash:
        name = next(text.name for text in extra_texts if text.sha256 in clash)
        raise CalibrationError(
            f"{name} is given both as calibration and as evaluation text.",
            hint="Rows of the calibration text are held out for evaluation anyway; leave out that --eval-text.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.companions(), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SourceError(f"The tokenizer of {run.source.base.name} cannot be loaded: {first}") from error
    rows = split_rows(
        texts,
        tokenizer,
        seq_len=config.seq_len,
        samples=config.samples,
        selection=config.selection_rows,
        held_out=config.eval_rows,
        seed=config.seed,
    )
    extra = [evaluation_rows(text, tokenizer, seq_len=config.seq_len, rows=config.eval_rows) for text in extra_texts]
    run.reporter.finish(f"{rows.fit.numel():,} tokens from {', '.join(text.name for text in texts)}")
    return rows, extra


def _texts(run: _Run, source: str, read_text: Callable[..., Any]) -> list[Any]:
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl", ".utf8", ".raw", ".md"):
        return [read_text(path)]
    if run.hub is None:
        from gradmap_hub.hub import Hub

        run.hub = Hub()
    paths, name = run.hub.fetch_dataset_text(source)
    # One text per data set: its first file is far more than calibration needs.
    return [read_text(paths[0], name)]


def _pull(run: _Run) -> _Fetched:
    folder = run.checkpoint()
    return _Fetched(sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def _score(run: _Run, rows: CalibrationRows) -> LayerScores:
    from gradmap_hub.scoring import LayerScores, score_layers

    scoring = rows.fit[: run.config.scoring_rows]

    def compute() -> LayerScores:
        decoder = run.decoder()
        run.reporter.total(len(scoring))
        return score_layers(decoder, scoring, window=run.removals, row_done=run.step)

    return run.stages.run(
        "score",
        "Scoring layers",
        LayerScores,
        compute,
        inputs={"rows": rows.sha256, "count": len(scoring), "window": run.removals},
        describe=lambda scores: f"{len(scores.layers)} layers, one backward pass over {scoring.numel():,} tokens",
    )


def _select(run: _Run, rows: CalibrationRows, scores: LayerScores) -> _Selected:
    """Form candidate sets from the scores and let the loss on held-out rows decide."""
    from gradmap_hub.evaluation import row_losses
    from gradmap_hub.scoring import iterative_removals
    from gradmap_hub.selection import candidates

    config = run.config

    def compute() -> _Selected:
        decoder = run.decoder()
        if config.drop is not None:
            sets: dict[str, list[int]] = {"chosen by hand": sorted(config.drop)}
        elif config.schedule == "iterative":
            scoring = rows.fit[: config.scoring_rows]
            run.reporter.total(len(scoring) * run.removals)
            sets = {"gradient, iterative": iterative_removals(decoder, scoring, run.removals, row_done=run.step)}
        else:
            sets = candidates(scores, run.removals, config.metric)
        run.reporter.total(len(sets) * len(rows.selection))
        tried = []
        for name, removed in sets.items():
            kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
            losses = row_losses(decoder, rows.selection, kept, run.step)
            tried.append(Candidate(name, removed, sum(losses) / len(losses)))
        best = min(tried, key=lambda candidate: candidate.loss)
        return _Selected(best.removed, None if config.drop is not None else best, tried)

    return run.stages.run(
        "select",
        "Choosing layers on held-out rows",
        _Selected,
        compute,
        inputs={"drop": config.drop, "metric": config.metric, "schedule": config.schedule},
        describe=lambda chosen: "remove " + _ranges(chosen.removed),
    )


def _evaluate_original(run: _Run, selected: _Selected, texts: Sequence[Rows]) -> _Losses:
    from gradmap_hub.evaluation import row_losses

    def compute() -> _Losses:
        decoder = run.decoder()
        kept = [layer for layer in range(decoder.count) if layer not in set(selected.removed)]
        run.reporter.total(2 * sum(len(text.ids) for text in texts))
        return _Losses(
            [row_losses(decoder, text.ids, None, run.step) for text in texts],
            [row_losses(decoder, text.ids, kept, run.step) for text in texts],
        )

    return run.stages.run(
        "evaluate-original",
        "Measuring the original and the pruned model",
        _Losses,
        compute,
        inputs={"texts": [(text.sha256, len(text.ids)) for text in texts], "seq_len": run.config.seq_len},
    )


def _compensate(run: _Run, rows: CalibrationRows, selected: _Selected) -> CompensationRecord:
    """Fit corrections at a few sites, keep the one with the lowest held-out loss, if it lowers it."""
    correction_file = run.work / "correction.safetensors"

    def compute() -> CompensationRecord:
        from safetensors.torch import save_file

        correction_file.unlink(missing_ok=True)
        decoder = run.decoder()
        kept = [layer for layer in range(decoder.count) if layer not in set(selected.removed)]
        record, weights = fit_correction(decoder, rows, kept, selected.removed, run.config, run.reporter)
        save_file(weights, correction_file)
        return record

    return run.stages.run(
        "compensate",
        "Correcting the drift",
        CompensationRecord,
        compute,
        inputs={"kind": run.config.compensation, "site": run.config.site, "samples": run.config.samples},
        files=lambda: [correction_file],
        describe=lambda record: (
            f"{record.kind} at layer {record.site}, held-out loss {record.loss_before:.3f} -> {record.loss_after:.3f}"
            if record.applied
            else record.reason
        ),
    )


def fit_correction(
    decoder: Decoder,
    rows: CalibrationRows,
    kept: Sequence[int],
    removed: Sequence[int],
    config: PruneConfig,
    reporter: Reporter,
) -> tuple[CompensationRecord, dict[str, Any]]:
    """The record of stage 2 and the corrected parameters of the site's down projection (empty if not applied)."""
    from gradmap_hub import compensation as stage2
    from gradmap_hub.evaluation import row_losses

    shift_rows = rows.fit[: max(2, config.scoring_rows // 2)]
    reporter.total(len(shift_rows))
    shift = stage2.mean_shift(decoder, shift_rows, kept, reporter.advance)
    shifts = {"shift_layers": shift.layers, "shift": shift.absolute, "relative_shift": shift.relative}
    if config.compensation == "none":
        return CompensationRecord(applied=False, reason="not asked for", **shifts), {}
    sites = stage2.candidate_sites(shift, removed, config.site)
    kinds = ("weight", "projection") if config.compensation == "auto" else (config.compensation,)
    grid = [(kind, strength) for kind in kinds for strength in stage2.STRENGTHS[kind]]
    reporter.total(len(rows.fit) + len(rows.selection) * (1 + len(sites) * len(grid)))
    grams = stage2.accumulate_grams(decoder, rows.fit, kept, sites, reporter.advance)
    losses = row_losses(decoder, rows.selection, kept, reporter.advance)
    baseline = sum(losses) / len(losses)
    trials: list[Trial] = []
    best: tuple[float, stage2.Correction] | None = None
    for site in sites:
        suffix = stage2.Suffix(decoder, rows.selection, kept, site)
        for kind, strength in grid:
            linear = decoder.mlp_output(site)
            correction = stage2.solve(grams[site], linear.weight, site=site, kind=kind, strength=strength)
            loss = suffix.loss(correction, reporter.advance)
            trials.append(Trial(site, kind, strength, loss))
            if best is None or loss < best[0]:
                best = (loss, correction)
        del grams[site]
    if best is None or best[0] >= baseline:
        reason = "no correction lowered the held-out loss"
        return CompensationRecord(
            applied=False, reason=reason, loss_before=baseline, loss_after=baseline, trials=trials, **shifts
        ), {}
    loss, correction = best
    linear = decoder.mlp_output(correction.site)
    weights = stage2.corrected_parameters(linear, correction)
    record = CompensationRecord(
        applied=True,
        kind=correction.kind,
        site=correction.site,
        strength=correction.strength,
        ridge=correction.ridge,
        loss_before=baseline,
        loss_after=loss,
        reason="lowest held-out loss",
        trials=trials,
        **shifts,
    )
    return record, weights


def _write(run: _Run, selected: _Selected, compensation: CompensationRecord) -> _Written:
    """Remove the layers, put the corrected weight in, save, read back, compare."""

    def compute() -> _Written:
        from safetensors.torch import load_file

        from gradmap_hub.exporters import checkpoint
        from gradmap_hub.pruning import parameter_count, remove_layers, storage_dtype
        from gradmap_hub.verification import logits_of, probe_ids, verify

        decoder = run.decoder()
        model = decoder.model
        before = parameter_count(model)
        if compensation.applied:
            assert compensation.site is not None
            for name, value in load_file(run.work / "correction.safetensors").items():
                parameter = decoder.mlp_output(compensation.site).get_parameter(name)
                parameter.data = value.to(parameter.dtype)
        remove_layers(model, run.source.architecture, selected.removed)
        after = parameter_count(model)
        source = run.checkpoint()
        names = legal_texts(path.name for path in source.iterdir())
        dtype = storage_dtype(run.config.dtype, run.source.base.dtype)
        checkpoint.save_checkpoint(model, run.output, dtype)
        checkpoint.copy_companions(source, run.output, [*COMPANION_FILES, *names])
        checkpoint.cast_parameters(model, _float32())
        expected = logits_of(model, probe_ids(model.config))
        run.release()
        del decoder, model
        gc.collect()
        reloaded, report = checkpoint.load_float32(run.output)
        verification = verify(reloaded, report, run.output, expected)
        return _Written(
            verification,
            BeforeAfter(before, after),
            BeforeAfter(run.source.weight_bytes or checkpoint.checkpoint_bytes(source),
                        checkpoint.checkpoint_bytes(run.output)),
            str(dtype).removeprefix("torch."),
        )  # fmt: skip

    return run.stages.run(
        "write",
        "Writing and verifying the checkpoint",
        _Written,
        compute,
        inputs={"dtype": run.config.dtype},
        files=lambda: [run.output / "config.json", *sorted(run.output.glob("*.safetensors"))],
        describe=lambda written: (
            f"{_size(written.bytes.before)} -> {_size(written.bytes.after)}, logits read back equal"
        ),
    )


def _evaluate_written(run: _Run, texts: Sequence[Rows]) -> _CompensatedLosses:
    """Perplexity of what was written, loaded afresh."""

    def compute() -> _CompensatedLosses:
        from gradmap_hub.decoder import Decoder
        from gradmap_hub.evaluation import row_losses
        from gradmap_hub.exporters.checkpoint import load_float32

        model, _ = load_float32(run.output)
        decoder = Decoder(model, run.source.architecture, run.config.seq_len)
        run.reporter.total(sum(len(text.ids) for text in texts))
        return _CompensatedLosses([row_losses(decoder, text.ids, None, run.step) for text in texts])

    run.release()
    return run.stages.run("evaluate-written", "Measuring the result", _CompensatedLosses, compute)


def _evaluation_record(
    run: _Run, texts: Sequence[tuple[Rows, str]], losses: _Losses, compensated: _CompensatedLosses
) -> EvaluationRecord:
    from gradmap_hub.evaluation import perplexity, ratio_interval

    measured = [
        TextPerplexity(
            name=rows.name,
            kind=kind,
            rows=len(rows.ids),
            tokens=rows.ids.numel(),
            sequence_length=run.config.seq_len,
            sha256=rows.sha256,
            original=perplexity(losses.original[index]),
            pruned=perplexity(losses.pruned[index]),
            compensated=perplexity(compensated.rows[index]),
            interval=ratio_interval(losses.original[index], compensated.rows[index]),
        )
        for index, (rows, kind) in enumerate(texts)
    ]
    first = measured[0]
    return EvaluationRecord("perplexity", first.original, first.compensated, first.pruned, first.name, measured)


def _calibration_record(run: _Run, rows: CalibrationRows) -> CalibrationRecord:
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


# -- export, card, Space -------------------------------------------------------------------------------------------


def _export_onnx(run: _Run, record: RunRecord) -> RunRecord:
    from gradmap_hub.exporters import onnx

    folder = run.output / "onnx"

    def compute() -> _Exported:
        onnx.export_onnx(run.output, folder)
        return _Exported(onnx.check_parity(run.output, folder))

    exported = run.stages.run(
        "onnx",
        "Exporting to ONNX and comparing with PyTorch",
        _Exported,
        compute,
        files=lambda: onnx.file_names(folder),
        describe=lambda done: f"max |logit difference| {done.parity.max_logit_difference:.1e}, greedy tokens equal",
    )
    artifacts = [artifact for artifact in record.artifacts if artifact.format != "onnx"]
    for path in onnx.file_names(folder):
        parity = exported.parity if path.name == onnx.MODEL else None
        artifacts.append(_artifact(path, run.output, "onnx", parity))
    return dataclasses.replace(record, artifacts=artifacts, timings=dict(run.stages.timings))


def _write_card(run: _Run, record: RunRecord, space: str | None = None) -> RunRecord:
    from gradmap_hub.card import write_card

    record = dataclasses.replace(record, space=space)
    record.write(run.output)
    write_card(record, run.output)
    return record


def _build_space(run: _Run, record: RunRecord, plan: PushPlan) -> Path:
    from gradmap_hub.exporters import onnx
    from gradmap_hub.space import ORIGINAL_FOLDER, write_space

    assert plan.space is not None
    destination = space_folder_of(run.output)
    companions: dict[str, Path] = {}
    if plan.space.original == "space":
        source = run.checkpoint()
        original = destination / ORIGINAL_FOLDER

        def compute() -> _Exported:
            destination.mkdir(parents=True, exist_ok=True)
            onnx.export_onnx(source, original)
            return _Exported(onnx.check_parity(source, original))

        run.stages.run(
            "onnx-original",
            "Exporting the original for the Space",
            _Exported,
            compute,
            files=lambda: [original / onnx.MODEL],
            describe=lambda done: f"max |logit difference| {done.parity.max_logit_difference:.1e}",
        )
        present = [*COMPANION_FILES, *legal_texts(path.name for path in source.iterdir())]
        companions = {name: source / name for name in present if (source / name).is_file()}
    write_space(record, plan.space, destination, pruned_repo=plan.target, companions=companions)
    return destination


# -- publish -------------------------------------------------------------------------------------------------------


def _publish(
    folder: Path,
    target: str,
    repo_type: str,
    message: str,
    hub: Hub,
    reporter: Reporter,
    variables: dict[str, str] | None = None,
) -> Published:
    size = sum(folder_sizes(folder).values())
    what = "model" if repo_type == "model" else "Space"
    reporter.start(f"Publishing the {what} to {target} ({_size(size)})")
    published = hub.publish(folder, target, repo_type=repo_type, message=message, variables=variables)
    reporter.finish(f"commit {published.commit[:12]}", reused=not published.uploaded)
    reporter.start(f"Verifying the {what} at that commit")
    checked = hub.verify(published, folder, repo_type=repo_type)
    reporter.finish(f"{_size(checked)} downloaded into a fresh cache, sha256 equal")
    return published


# -- small things --------------------------------------------------------------------------------------------------


def _identity(source: Source) -> dict[str, Any]:
    """What makes two sources the same for a resumed run."""
    if source.base.commit:
        return {"repo": source.base.repo_id, "commit": source.base.commit}
    paths = (
        [source.gguf]
        if source.gguf
        else [source.folder / name for name in source.files.weights]
        if source.folder
        else []
    )
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def _weight_artifacts(folder: Path) -> list[Artifact]:
    return [_artifact(path, folder, "safetensors") for path in sorted(folder.glob("*.safetensors"))]


def _artifact(path: Path, root: Path, kind: str, parity: Parity | None = None) -> Artifact:
    from gradmap_hub.hub import sha256_of

    return Artifact(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path), kind, parity)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _dtype_of(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _languages(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(entry) for entry in value or []]


def _float32() -> Any:
    import torch

    return torch.float32


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ranges(indices: Sequence[int]) -> str:
    """[3, 12, 13, 14] -> '3, 12-14'."""
    parts: list[str] = []
    start = previous = indices[0]
    for index in [*indices[1:], None]:
        if index is not None and index == previous + 1:
            previous = index
            continue
        parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        if index is not None:
            start = previous = index
    return ", ".join(parts)
