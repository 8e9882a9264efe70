"""What a run is asked to do: frozen, validated when built, with the help text of each option beside it.

The command line reads the help texts from here (`help_of`), so that they are written once.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from gradmap_hub.errors import UsageError
from gradmap_hub.formats import quantized

Metric = Literal["auto", "gradient", "taylor", "block-influence", "gradient-window", "cosine-window"]
Schedule = Literal["oneshot", "iterative"]
Compensation = Literal["auto", "projection", "weight", "none"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Site = Literal["auto", "around-gaps", "largest-shift"]
Device = Literal["auto", "cpu", "cuda"]
Compute = Literal["auto", "float32", "bfloat16"]

METRICS: tuple[str, ...] = (
    "auto",
    "gradient",
    "taylor",
    "block-influence",
    "gradient-window",
    "cosine-window",
)
SCHEDULES: tuple[str, ...] = ("oneshot", "iterative")
COMPENSATIONS: tuple[str, ...] = ("auto", "projection", "weight", "none")
DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
DEVICES: tuple[str, ...] = ("auto", "cpu", "cuda")
COMPUTES: tuple[str, ...] = ("auto", "float32", "bfloat16")
PRESETS: tuple[str, ...] = ("default", "paper")

# WikiText as the Hub serves it: the default when no text is given.
DEFAULT_CALIBRATION = "Salesforce/wikitext:wikitext-2-raw-v1/train"
# What `evaluate` measures on by default.
DEFAULT_EVALUATION = "Salesforce/wikitext:wikitext-2-raw-v1/test"


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def help_of(config_class: type, name: str) -> str:
    """The help text of a configuration field."""
    for entry in dataclasses.fields(config_class):
        if entry.name == name:
            return entry.metadata["help"]
    raise KeyError(name)


@dataclass(frozen=True)
class PruneMethod:
    """How to prune, whatever the number of layers that go.

    Raises:
        UsageError: a value outside its range.
    """

    metric: Metric = _option(
        "auto",
        "How layers are chosen. auto: several rankings of one scoring pass propose sets, the best window is tried with "
        "every further layer, and the held-out loss decides. "
        "gradient: GradMAP's gradient L1. Others: taylor, block-influence, gradient-window, cosine-window.",
    )
    schedule: Schedule = _option(
        "oneshot", "oneshot: one backward pass, then all removals. iterative: one backward pass per removal."
    )
    compensation: Compensation = _option(
        "auto",
        "What is fitted and folded at a site. projection: P on the output (the paper). weight, which auto means: the "
        "output weight itself, a ridge regression with more unknowns. none: nothing.",
    )
    site: Site = _option(
        "auto",
        "Where the correction goes. largest-shift: the layer whose mean hidden state moved most (the paper). "
        "auto: the MLP before every gap. around-gaps: also attention and MLP behind it. Each as far as it lowers the "
        "held-out loss.",
    )
    calibration: tuple[str, ...] = _option(
        (DEFAULT_CALIBRATION,),
        "Calibration text; repeat to mix sources. A .txt or .jsonl file (key `text`), or a Hub dataset as "
        "owner/name[:config[/split]].",
    )
    eval_text: tuple[str, ...] = _option(
        (), "Further text to measure perplexity on, never used for calibration; repeatable. Same forms."
    )
    samples: int = _option(
        32, "Calibration rows for the compensation; a quarter of them, at least 4, score the layers."
    )
    seq_len: int = _option(512, "Tokens per row.")
    eval_rows: int = _option(12, "Held-out rows per evaluation text.")
    dtype: DType = _option("auto", "Number format of the written weights. auto: that of the original.")
    seed: int = _option(0, "Seed of the choice of rows.")
    low_memory: bool = _option(
        False,
        "Map the weights from disk and stream them layer by layer, forward and backward: about three layers in memory "
        "however deep the model. Same result; slower where the disk is.",
    )
    heal: int = _option(
        0,
        "Steps of a short distillation from the original after the correction: weights of the layers around the gaps, "
        "one row a step, kept only where it lowers the held-out loss. 0: none.",
    )
    device: Device = _option("auto", "Where to compute. auto: CUDA if there is a GPU, else the CPU.")
    compute: Compute = _option(
        "auto",
        "Number format of the computation. auto: bfloat16 for models stored in it where the machine is fast at it, "
        "else float32.",
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("metric", METRICS),
            ("schedule", SCHEDULES),
            ("compensation", COMPENSATIONS),
            ("dtype", DTYPES),
            ("site", ("auto", "around-gaps", "largest-shift")),
            ("device", DEVICES),
            ("compute", COMPUTES),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name, least in (("samples", 4), ("seq_len", 16), ("eval_rows", 2), ("seed", 0), ("heal", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(self, name)}.")
        if self.low_memory and self.device == "cuda":
            raise UsageError("--low-memory streams the weights through the CPU; leave out --device cuda.")
        if self.heal and self.low_memory:
            raise UsageError("--heal trains weights in memory; leave out --low-memory or --heal.")
        if not self.calibration:
            raise UsageError("--calibration needs at least one text.")

    @property
    def scoring_rows(self) -> int:
        """Rows of the backward pass: it costs three forwards a row and its ranking settles early."""
        return max(4, self.samples // 4) if self.samples >= 4 else self.samples

    @property
    def shift_rows(self) -> int:
        """Rows of the mean shift, a first moment: a few are enough."""
        return max(2, self.scoring_rows // 2)

    @property
    def selection_rows(self) -> int:
        """Held-out rows that decide between candidates and between ridge strengths."""
        return max(4, self.samples // 4)

    @property
    def swaps(self) -> bool:
        """Whether the search exchanges single layers of the best set. Only where nothing is corrected: swaps scatter
        the gaps, and what they gained before the correction they lost after it (docs/method.md)."""
        return self.metric == "auto" and self.schedule == "oneshot" and self.compensation == "none"


@dataclass(frozen=True)
class PruneConfig(PruneMethod):
    """How to prune, and how much: exactly one of `ratio`, `layers`, `drop`.

    Raises:
        UsageError: a value outside its range, or several ways to say how much.
    """

    ratio: float | None = _option(None, "Share of the decoder layers to remove, between 0 and 1 (0.25 = a quarter).")
    layers: int | None = _option(None, "Number of decoder layers to remove.")
    drop: tuple[int, ...] | None = _option(None, "Indices of the decoder layers to remove, such as 12,13,14.")

    def __post_init__(self) -> None:
        asked = [value for value in (self.ratio, self.layers, self.drop) if value is not None]
        if len(asked) != 1:
            raise UsageError("Say how much to remove with exactly one of --ratio, --layers and --drop.")
        if self.ratio is not None and (not math.isfinite(self.ratio) or not 0 < self.ratio < 1):
            raise UsageError(f"--ratio must lie between 0 and 1, both excluded; got {self.ratio:g}.")
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"--layers must be at least 1; got {self.layers}.")
        if self.drop is not None and (not self.drop or min(self.drop) < 0 or len(set(self.drop)) < len(self.drop)):
            raise UsageError("--drop takes distinct layer indices, counted from 0.")
        super().__post_init__()

    def removals(self, layer_count: int) -> int:
        """How many of `layer_count` layers go: round half up, at least one, at most all but one.

        Raises:
            UsageError: more layers asked for than can go.
        """
        if self.ratio is not None:
            return removals_of_ratio(self.ratio, layer_count)
        if self.drop is not None:
            if max(self.drop) >= layer_count:
                raise UsageError(
                    f"--drop names layer {max(self.drop)}; the model has {layer_count} layers, 0 to {layer_count - 1}."
                )
            wanted = len(self.drop)
        else:
            assert self.layers is not None  # __post_init__ saw to it
            wanted = self.layers
        if wanted >= layer_count:
            raise UsageError(f"Cannot remove {wanted} of {layer_count} layers: at least one must stay.")
        return wanted


class MethodOptions(TypedDict, total=False):
    """The fields of `PruneMethod` as keyword arguments."""

    metric: Metric
    schedule: Schedule
    compensation: Compensation
    site: Site
    calibration: tuple[str, ...]
    eval_text: tuple[str, ...]
    samples: int
    seq_len: int
    eval_rows: int
    dtype: DType
    seed: int
    low_memory: bool
    heal: int
    device: Device
    compute: Compute


def removals_of_ratio(ratio: float, layer_count: int) -> int:
    """How many of `layer_count` layers a ratio removes: round half up, at least one, at most all but one."""
    return min(max(math.floor(ratio * layer_count + 0.5), 1), layer_count - 1)


Method = TypeVar("Method", bound=PruneMethod)


def paper_preset(config: Method) -> Method:
    """The paper's own setting: gradient ranking, one projection at the layer of the largest mean shift."""
    return dataclasses.replace(config, metric="gradient", compensation="projection", site="largest-shift")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure on a finished folder and its original.

    Raises:
        UsageError: a value outside its range.
    """

    against: str | None = _option(None, "The original: a Hub id or a folder. Default: as recorded.")
    text: tuple[str, ...] = _option(
        (DEFAULT_EVALUATION,),
        "Text to measure perplexity and agreement on; repeatable. A .txt or .jsonl file (key `text`), or a Hub dataset "
        "as owner/name[:config[/split]].",
    )
    tasks: tuple[str, ...] = _option(
        (), "Tasks of lm-evaluation-harness, comma-separated; `paper` means the seven of the paper."
    )
    tasks_from: Path | None = _option(
        None,
        "Folder that holds the documents of the tasks, NAME.SPLIT.jsonl in the harness' field names; none is fetched.",
    )
    limit: int | None = _option(None, "Only the first so many documents of each task.")
    seq_len: int = _option(512, "Tokens per row.")
    rows: int = _option(32, "The most rows of each text, spread evenly over it.")
    speed: bool = _option(True, "Measure tokens per second.")

    def __post_init__(self) -> None:
        for name, least in (("limit", 2), ("seq_len", 16), ("rows", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
        if not self.text:
            raise UsageError("--text needs at least one text.")
        if self.tasks_from is not None and not self.tasks:
            raise UsageError("--tasks-from says where documents are; say which tasks with --tasks.")
        if self.limit is not None and not self.tasks:
            raise UsageError("--limit is for tasks; name them with --tasks, or limit the text with --rows.")


@dataclass(frozen=True)
class Expected:
    """What a run that repeats an earlier one must find again, or it would make another model; None: anything will do.

    `commit`: of the original on the Hub. `weights_sha256`: of a local original. `rows_sha256`: of the calibration rows.
    """

    commit: str | None = None
    weights_sha256: str | None = None
    rows_sha256: str | None = None


@dataclass(frozen=True)
class PublishConfig:
    """Where a model that is built goes, and what is allowed there.

    Raises:
        UsageError: a number outside its range.
    """

    to: str | None = _option(None, "Target repository OWNER/NAME; default: your account, name of the output folder.")
    space: bool = _option(True, "Build and publish the comparison Space.")
    public: bool = _option(False, "Make both repositories public, after everything is verified.")
    update: bool = _option(False, "Replace an earlier push of the same model to the same target, in one commit.")
    create_pr: bool = _option(
        False, "Propose the model to a repository of somebody else (--to) as a pull request; no Space, nothing else."
    )
    license: str | None = _option(None, "Licence id for the card, when the original states none.")
    license_name: str | None = _option(None, "Name of the licence, with --license other or an original that says so.")
    license_link: str | None = _option(None, "Where that licence stands: an address, or a file such as LICENSE.")
    collection: str | None = _option(
        None,
        "Also add model and Space to this collection, OWNER/SLUG or [OWNER/]TITLE; one that is not there is created, "
        "private.",
    )
    wait_space: int = _option(
        300, "Seconds to wait for the published Space to build and start; it goes on without us. 0: do not look."
    )

    def __post_init__(self) -> None:
        if self.wait_space < 0:
            raise UsageError(f"--wait-space takes seconds, 0 or more; got {self.wait_space}.")


class PublishOptions(TypedDict, total=False):
    """The fields of `PublishConfig` as keyword arguments."""

    to: str | None
    space: bool
    public: bool
    update: bool
    create_pr: bool
    license: str | None
    license_name: str | None
    license_link: str | None
    collection: str | None
    wait_space: int


@dataclass(frozen=True)
class PushConfig(PublishConfig):
    """What is pruned, and where the result goes. `repeats`: what must be found again (`--from`)."""

    model: str = _option("", "A Hub id (org/model), a local folder, or a .gguf file.")
    prune: PruneConfig = field(default_factory=lambda: PruneConfig(ratio=0.25))
    revision: str | None = _option(None, "Branch, tag or commit of the original.")
    output: Path | None = _option(None, "Folder for the result; default: NAME-gradmap-PERCENT here.")
    onnx: bool = _option(True, "Export to ONNX with KV cache.")
    quantize: tuple[str, ...] = _option(
        (),
        "Further ONNX files, comma-separated: int8 (weights in 8 bits), int4, genai. Each is compared with PyTorch; "
        "one that costs more than 2 % (int8) or 10 % (int4) of perplexity is not published.",
    )
    resume: bool = _option(False, "Go on with an unfinished run in the output folder.")
    trust_remote_code: bool = _option(False, "Not available yet: models that need their own code are refused.")
    repeats: Expected | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        strange = [name for name in self.quantize if name not in quantized()]
        if strange:
            raise UsageError(f"--quantize takes {', '.join(quantized())}; got {strange[0]!r}.")
        if self.quantize and not self.onnx:
            raise UsageError("--quantize makes ONNX files; leave out --no-onnx.")


@dataclass(frozen=True)
class SweepConfig:
    """What is measured at which ratios, each pruned by the method `prune`.

    Raises:
        UsageError: no ratio, one that is not between 0 and 1, or a bound that cannot be.
    """

    model: str = _option("", help_of(PushConfig, "model"))
    ratios: tuple[float, ...] = _option(
        (0.1, 0.2, 0.3), "Shares of the decoder layers to remove, comma-separated, each between 0 and 1."
    )
    prune: PruneMethod = field(default_factory=PruneMethod)
    revision: str | None = _option(None, help_of(PushConfig, "revision"))
    output: Path | None = _option(None, "Folder for sweep.json, sweep.md and sweep.png; default: NAME-sweep here.")
    speed: bool = _option(
        True, "Time the pruned model against the original, reading a prompt and writing (PyTorch, batch 1)."
    )
    max_loss: float | None = _option(
        None, "Recommend the largest ratio at which perplexity rises by at most so many percent, instead of the knee."
    )

    def __post_init__(self) -> None:
        if not self.ratios or not all(math.isfinite(ratio) and 0 < ratio < 1 for ratio in self.ratios):
            given = ",".join(f"{ratio:g}" for ratio in self.ratios)
            raise UsageError(
                f"--ratios takes numbers between 0 and 1, both excluded, such as 0.1,0.2,0.3; got {given!r}."
            )
        if self.max_loss is not None and not (math.isfinite(self.max_loss) and self.max_loss >= 0):
            raise UsageError(f"--max-loss takes a percentage, 0 or more; got {self.max_loss:g}.")

    def ratios_by_count(self, layer_count: int) -> dict[int, list[float]]:
        """How many of `layer_count` layers go, ascending -> the ratios asked for that come to it."""
        found: dict[int, list[float]] = {}
        for ratio in sorted(set(self.ratios)):
            found.setdefault(removals_of_ratio(ratio, layer_count), []).append(ratio)
        return found

    def push_command(self, ratio: float) -> str:
        """The command line that makes and publishes the model at this ratio, with the options that the sweep had."""
        words = ["gradmap-hub", "push", self.model, "--ratio", str(ratio)]
        words += ["--revision", self.revision] if self.revision else []
        by_default = PruneMethod()
        paper = paper_preset(by_default)
        if self.prune.site == paper.site:  # no option of its own
            words += ["--preset", "paper"]
            by_default = paper
        for entry in dataclasses.fields(PruneMethod):
            value = getattr(self.prune, entry.name)
            if entry.name == "site" or value == getattr(by_default, entry.name):
                continue
            flag = "--" + entry.name.replace("_", "-")
            for single in value if isinstance(value, tuple) else (value,):
                words += [flag] if single is True else [flag, str(single)]
        return shlex.join(words)
