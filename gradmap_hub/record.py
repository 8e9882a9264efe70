"""The RunRecord: all decisions and measurements of a run, one JSON file (gradmap.json) per model folder.

The command line, the card and the Space read only this file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import SourceError
from gradmap_hub.files import parse_json, read_json, write_text
from gradmap_hub.measurements import BeforeAfter, Measured
from gradmap_hub.reading import (
    Count,
    NotNegative,
    OptionalInterval,
    PathInside,
    Positive,
    check_fields,
    from_json,
)

# 2: adds `settings`.
SCHEMA_VERSION = 2
FILE_NAME = "gradmap.json"


@dataclass(frozen=True)
class Base:
    """The original model. A model from the Hub has a `commit`; a local folder or file has a `weights_sha256` (see
    `layout.weights_sha256`)."""

    name: str
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    license: str | None = None
    # "original": from its card; "publisher": given with --license because the card states none.
    license_source: str = "original"
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False
    private: bool = False
    language: list[str] = field(default_factory=list)
    model_type: str = ""
    dtype: str = ""
    has_onnx: bool = False
    # Precisions (see formats.py) of the ONNX files in its repository that are comparable to ours.
    exports: list[str] = field(default_factory=list)
    weights_sha256: str | None = None
    # Whether transformers 4.57 cannot read the files of its repository.
    needs_5: bool = False


@dataclass(frozen=True)
class LayerDecision:
    """One decoder layer. `score`: its gradient L1 norm, even if another ranking won; its gate gradient if no weight
    gradients were computed (see `pruning.scoring`)."""

    index: Count
    score: float
    kept: bool
    reason: str


# Suffixes of the names of candidate sets that the search derived from another set.
SWAPPED = ", swapped"
GROWN = " and one more"


@dataclass(frozen=True)
class Candidate:
    """One set of layers whose removal was tried on held-out sequences. `loss`: in nats per token, without compensation;
    `corrected`: with compensation, for the sets for which it was fitted."""

    name: str
    removed: list[int]
    loss: float
    corrected: float | None = None


@dataclass(frozen=True)
class TextSource:
    """A text of a run: the sha256 of the whole text, and the number of its sequences used (`rows`)."""

    name: str
    sha256: str
    rows: Count


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration sequences: `samples` of them, of `sequence_length` tokens each; `sha256`: of their token ids."""

    source: str
    samples: Count
    tokens: Count
    sequence_length: Count
    sha256: str
    scoring_rows: Count = 0
    selection_rows: Count = 0
    texts: list[TextSource] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """One tried compensation. `site`: the layer (original index); `strength`: the ridge parameter lambda divided by the
    mean diagonal of the Gram matrix; `loss`: on held-out sequences, in nats per token."""

    site: int
    kind: str
    strength: float
    loss: float
    part: str = "mlp"


@dataclass(frozen=True)
class SiteCompensation:
    """One applied compensation, at the attention or MLP output (`part`) of a layer (original index). `strength`: see
    `Trial`; `ridge`: lambda itself; losses: on held-out sequences, in nats per token."""

    layer: int
    part: str
    kind: str
    strength: float
    ridge: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class CompensationRecord:
    """The compensation (stage 2 of docs/method.md). `kind`, `site`, `strength` and `ridge` are those of the site that
    lowered the loss most; `corrections` lists all applied sites in the order of the stream. `shift`: the L2 norm of
    the change of the mean hidden state after each of `shift_layers` (original indices of kept layers);
    `relative_shift`: the same divided by the norm of the original mean."""

    applied: bool
    kind: str | None = None
    site: int | None = None
    strength: float | None = None
    ridge: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    reason: str = ""
    shift_layers: list[int] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)
    relative_shift: list[float] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    corrections: list[SiteCompensation] = field(default_factory=list)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for each contradiction between fields."""
        if not len(self.shift_layers) == len(self.shift) == len(self.relative_shift):
            yield "shift_layers", "is not as long as shift and relative_shift"
        if len(self.corrections) > 1 and (self.loss_before is None or self.loss_after is None):
            yield "loss_after", "or loss_before is null with several corrections"


@dataclass(frozen=True)
class HealCheck:
    """An evaluation after `step` steps and `tokens` tokens. `loss`: mean NLL on the held-out sequences; `held_out`:
    mean KL(original || pruned) on them, None in records before version 0.2; `divergence`: mean of the training
    objective since the last check. All in nats per token."""

    step: Count
    divergence: float
    loss: float
    tokens: Count = 0
    held_out: float | None = None


@dataclass(frozen=True)
class HealRecord:
    """The distillation after stage 2.

    `rate`: peak learning rate. Losses (mean NLL) and divergences (mean KL(original || pruned)) are measured on the
    `held_out` texts, in nats per token. `layers`: the trained ones (original indices), empty if the result was
    discarded. `part`: all, gaps or lora (see `healing.parts`). `tokens`: number trained on, from `texts`, which were
    read `repeats` times; `seconds`: of training. `self_text`: for text that the original wrote, its tokens, the numbers
    of samples drawn and dropped by each filter, and the `recipe` of sampling and filtering; else None."""

    applied: bool
    steps: Count
    rate: float
    loss_before: float
    loss_after: float
    reason: str = ""
    layers: list[int] = field(default_factory=list)
    checks: list[HealCheck] = field(default_factory=list)
    part: str = "gaps"
    tokens: Count = 0
    repeats: float = 0.0
    seconds: NotNegative = 0.0
    divergence_before: float | None = None
    divergence_after: float | None = None
    texts: list[TextSource] = field(default_factory=list)
    held_out: list[TextSource] = field(default_factory=list)
    self_text: dict[str, Any] | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for each contradiction between fields."""
        if self.applied and not self.layers:
            yield "layers", "is empty, though the healing was applied"
        if self.applied and self.tokens and (self.divergence_before is None or self.divergence_after is None):
            yield "divergence_after", "or divergence_before is null, though tokens are counted"
        if self.tokens and any(check.held_out is None for check in self.checks):
            yield "checks", "lack held_out, though tokens are counted"


@dataclass(frozen=True)
class VerificationRecord:
    """The saved folder, loaded again with plain transformers, compared with the model in memory.
    `max_logit_difference`: absolute, on a probe of `tokens` tokens; `generation_matches`: whether decoding with KV
    cache equals a pass without."""

    keys_match: bool
    max_logit_difference: float
    tokens: Count
    generation_matches: bool


@dataclass(frozen=True)
class TextPerplexity:
    """Token perplexity on one text: exp(mean NLL) over non-overlapping sequences; `interval` is the 95% bootstrap
    interval (over sequences) of compensated / original."""

    name: str
    kind: str
    rows: Count
    tokens: Count
    sequence_length: Count
    sha256: str
    original: Positive
    pruned: Positive
    compensated: Positive
    interval: OptionalInterval = field(default_factory=list)
    # Its sequences, counted from 0, with a 13-gram overlap with a calibration sequence; None: not checked.
    contaminated: list[int] | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """Perplexities of the run. `before` (original), `after` (result) and `uncompensated` (pruned, before compensation)
    are those of the first of `texts`, named in `data`."""

    metric: str
    before: Positive
    after: Positive
    uncompensated: Positive
    data: str
    texts: list[TextPerplexity] = field(default_factory=list)


@dataclass(frozen=True)
class Parity:
    """An export compared with PyTorch: largest absolute logit differences, without and with past keys and values, and
    whether all `greedy_tokens` tokens of greedy decoding are equal."""

    max_logit_difference: float
    max_logit_difference_with_past: float
    greedy_tokens_equal: bool
    greedy_tokens: Count


@dataclass(frozen=True)
class Quality:
    """The cost of a quantised export: token perplexity of the graph on ONNX Runtime and of the checkpoint in float32,
    on the same sequences. `recipe`: the selected settings; `base`: the quantised graph, "genai" or "optimum"."""

    perplexity: Positive
    checkpoint_perplexity: Positive
    text: str
    tokens: Count
    recipe: str
    base: str

    @property
    def ratio(self) -> float:
        return self.perplexity / self.checkpoint_perplexity


@dataclass(frozen=True)
class Artifact:
    """A file of the model folder. `path`: relative to it; `format`: safetensors, or a name in `formats.FORMATS`."""

    path: PathInside
    bytes: Count
    sha256: str
    format: str
    parity: Parity | None = None
    quality: Quality | None = None


@dataclass(frozen=True)
class RunRecord:
    """All decisions and measurements of a run: what its stages pass on, and what the published repository states.

    `settings`: the fields of PruneConfig as the run used them, with "auto" resolved and texts by their recorded names;
    None in records of schema version 1. `--from` needs only `settings` and `base`."""

    schema_version: int
    gradmap_hub: str
    command: str
    name: str
    base: Base
    layers: list[LayerDecision]
    removed: list[int]
    ratio: float
    parameters: BeforeAfter
    bytes: BeforeAfter
    metric: str
    schedule: str
    calibration: CalibrationRecord
    compensation: CompensationRecord
    seed: int
    candidates: list[Candidate] = field(default_factory=list)
    verification: VerificationRecord | None = None
    evaluation: EvaluationRecord | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    target: str | None = None
    space: str | None = None
    dtype: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    hardware: str = ""
    heal: HealRecord | None = None
    settings: dict[str, Any] | None = None
    # The result of `evaluate`; the note says why an earlier result was dropped.
    measured: Measured | None = None
    measured_note: str = ""
    # Tensors of the original's checkpoint that its model does not have, such as of another head.
    unused_tensors: list[str] = field(default_factory=list)

    @property
    def layers_before(self) -> int:
        return len(self.layers)

    @property
    def layers_after(self) -> int:
        return len(self.layers) - len(self.removed)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for each contradiction between fields."""
        if [layer.index for layer in self.layers] != list(range(len(self.layers))):
            yield "layers", "are not numbered from 0"
        gone = set(self.removed)
        if len(gone) != len(self.removed) or not gone < set(range(len(self.layers))):
            yield "removed", "repeats a layer, names one that does not exist, or names all of them"
        if any(layer.kept == (layer.index in gone) for layer in self.layers):
            yield "layers", "disagree with removed"
        corrected = {entry.layer for entry in self.compensation.corrections} | {self.compensation.site or 0}
        named = corrected | set(self.compensation.shift_layers) | set(self.heal.layers if self.heal else ())
        if not named <= set(range(len(self.layers))):
            yield "compensation", "or heal names a layer that does not exist"
        paths = [entry.path for entry in self.artifacts]
        if len(set(paths)) != len(paths):
            yield "artifacts", "list a path twice"
        settings = self.settings or {}
        if isinstance(settings.get("heal"), int):  # steps were a number
            settings = settings | {"heal": str(settings["heal"])}
        check_fields(PruneConfig, settings, "settings")

    def write(self, folder: Path) -> None:
        path = folder / FILE_NAME
        write_text(path, to_json(self) + "\n")

    @staticmethod
    def read(folder: Path) -> RunRecord:
        """Read `folder`/gradmap.json.

        Raises:
            SourceError: the file is missing or is not a record.
        """
        try:
            return read_record(folder / FILE_NAME)
        except FileNotFoundError:
            raise SourceError(
                f"{folder} has no {FILE_NAME}: it is not a finished folder of gradmap-hub.",
                hint="Make one with `gradmap-hub prune MODEL OUTPUT` or `gradmap-hub push MODEL`, or finish its run "
                "with --resume.",
            ) from None


def read_record(path: Path) -> RunRecord:
    """Read a record from a file of any name.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: the file is not a record; the error names the field.
    """
    try:
        return from_json(RunRecord, read_json(path, finite=True))
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise _not_a_record(str(path), error) from error


def parse_record(content: bytes, name: str) -> RunRecord:
    """The record in a file's content; `name`: of the file, for errors.

    Raises:
        SourceError: it is not a record; the error names the field.
    """
    try:
        return from_json(RunRecord, parse_json(content, finite=True))
    except ValueError as error:
        raise _not_a_record(name, error) from error


def _not_a_record(name: str, error: Exception) -> SourceError:
    return SourceError(
        f"{name} cannot be read as a record of gradmap-hub: {error}.",
        hint="The file may be edited, damaged or unreadable. Restore it, or recreate the folder with `gradmap-hub "
        "prune` or `push`; if it comes from somebody else's Hub repository, ask its owner to publish it again.",
    )


def to_json(value: Any) -> str:
    """A dataclass as indented JSON.

    Raises:
        ValueError: it contains NaN or infinity.
    """
    return json.dumps(as_data(value), indent=2, ensure_ascii=False, allow_nan=False)


def as_data(value: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data. The key `further` is left out where it is empty."""
    return dataclasses.asdict(value, dict_factory=lambda pairs: {k: v for k, v in pairs if v or k != "further"})
