"""The settings of a run: frozen, validated on construction, each with its help text.

The command line reads the help texts from here (`help_of`).
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from gradmap_hub.budget import Budget, parse_budget
from gradmap_hub.errors import UsageError
from gradmap_hub.formats import quantized

Schedule = Literal["oneshot", "iterative"]
Compensation = Literal["auto", "projection", "weight", "none"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Site = Literal["auto", "around-gaps", "largest-shift"]
Device = Literal["auto", "cpu", "cuda"]
Compute = Literal["auto", "float32", "bfloat16"]

# Values of --metric: auto, and the names in `pruning.candidates.RANKINGS`; `pruning.candidates.register` adds to both.
METRICS: list[str] = [
    "auto",
    "gradmap",
    "gate",
    "gradient",
    "taylor",
    "block-influence",
    "gradient-window",
    "taylor-window",
    "cosine-window",
]
# Those that need no weight gradients, which are a quarter of the matrix products of scoring.
WITHOUT_WEIGHTS = frozenset({"gradmap", "gate", "block-influence", "cosine-window"})
SCHEDULES: tuple[str, ...] = ("oneshot", "iterative")
COMPENSATIONS: tuple[str, ...] = ("auto", "projection", "weight", "none")
DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
DEVICES: tuple[str, ...] = ("auto", "cpu", "cuda")
COMPUTES: tuple[str, ...] = ("auto", "float32", "bfloat16")
HEAL_PARTS: tuple[str, ...] = ("auto", "all", "gaps", "lora")
PRESETS: tuple[str, ...] = ("default", "paper")

# The default text: WikiText on the Hub.
DEFAULT_CALIBRATION = "Salesforce/wikitext:wikitext-2-raw-v1/train"
# Stands for a text that the original writes itself.
SELF = "self"
# The default text of `evaluate`.
DEFAULT_EVALUATION = "Salesforce/wikitext:wikitext-2-raw-v1/test"


def option(default: Any, help_text: str) -> Any:
    """A field of a configuration with its help text."""
    return field(default=default, metadata={"help": help_text})


def help_of(config_class: type, name: str) -> str:
    """The help text of a configuration field."""
    for entry in dataclasses.fields(config_class):
        if entry.name == name:
            return entry.metadata["help"]
    raise KeyError(name)


@dataclass(frozen=True)
class PruneMethod:
    """How to prune, independent of the number of layers to remove.

    Raises:
        UsageError: an invalid value, or options that exclude each other.
    """

    metric: str = option(
        "auto",
        "How layers are chosen. auto: several rankings from one scoring pass propose sets of layers, the best window "
        "is also tried with each further layer, and the held-out loss decides. gradmap: the layers whose change of the "
        "residual stream, weighted by its gradient, is smallest. gradient: L1 norm of weight gradients. Others: "
        f"{', '.join(name for name in METRICS[2:] if name != 'gradient')}.",
    )
    schedule: Schedule = option(
        "oneshot", "oneshot: one backward pass, then all removals. iterative: one backward pass per removal."
    )
    compensation: Compensation = option(
        "auto",
        "What is fitted at an attention or MLP output and folded into its weight. projection: a matrix P applied to "
        "the output (the paper). weight (auto): the output weight itself, by a ridge regression with more unknowns. "
        "none: no compensation.",
    )
    site: Site = option(
        "auto",
        "Where to compensate. largest-shift: the layer whose mean hidden state shifts most (the paper). auto: the MLP "
        "before each gap. around-gaps: also attention and MLP after it. Only sites that lower the held-out loss are "
        "kept.",
    )
    calibration: tuple[str, ...] = option(
        (DEFAULT_CALIBRATION,),
        "Calibration text; repeat to mix sources. A .txt or .jsonl file (key `text`), a Hub dataset as "
        "owner/name[:config[/split]], or `self`: text that the original writes itself.",
    )
    eval_text: tuple[str, ...] = option(
        (),
        "Further text to measure perplexity on, not used for calibration; repeat for more. A file or a data set as for "
        "--calibration.",
    )
    samples: int = option(
        32, "Calibration sequences for the compensation; a quarter of them, at least 4, score the layers."
    )
    seq_len: int = option(512, "Tokens per sequence.")
    eval_rows: int = option(12, "Held-out sequences per evaluation text.")
    dtype: DType = option("auto", "Dtype of the written weights. auto: that of the original.")
    seed: int = option(0, "Random seed for the choice of sequences and for text that the original writes.")
    low_memory: bool = option(
        False,
        "Stream the weights from disk layer by layer, forward and backward: about three layers in memory at any depth. "
        "Same result; slower if the disk is slow.",
    )
    heal: str = option(
        "0",
        "Budget of a distillation from the original after the compensation, kept only if it lowers the held-out "
        "divergence: tokens (500k, 10M), time (30m, 2h) or steps (20). 0: none.",
    )
    heal_text: tuple[str, ...] = option(
        (),
        "Text to heal on; repeat to mix sources. `self`: text that the original writes itself. Default: the "
        "calibration text, and for a model with a chat template also `self`.",
    )
    heal_part: str = option(
        "auto",
        "Weights that healing trains: all layers, those around the gaps, or lora (low-rank adapters, merged "
        "afterwards). auto: the largest part that fits into memory.",
    )
    device: Device = option("auto", "Where to compute. auto: CUDA if a GPU is available, else the CPU.")
    compute: Compute = option(
        "auto",
        "Dtype of the computation. auto: bfloat16 for models stored in it if the machine supports it natively, else "
        "float32.",
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
            ("heal_part", HEAL_PARTS),
        ):
            if getattr(self, name) not in allowed:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name, least in (("samples", 4), ("seq_len", 16), ("eval_rows", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(self, name)}.")
        if self.low_memory and self.device == "cuda":
            raise UsageError("--low-memory computes on the CPU; leave out --device cuda.")
        parse_budget(self.heal)
        if SELF in (*self.calibration, *self.heal_text) and self.low_memory:
            raise UsageError("The text `self` needs the original in memory; leave out --low-memory or `self`.")
        if SELF in self.eval_text:
            raise UsageError("--eval-text must not be `self`: text that the original writes would favour the original.")
        if not self.calibration:
            raise UsageError("--calibration needs at least one text.")

    @property
    def budget(self) -> Budget | None:
        """The parsed `heal`; None for no healing."""
        return parse_budget(self.heal)

    @property
    def scoring_rows(self) -> int:
        """Number of sequences that score the layers, each in a backward pass, at the cost of three forward passes. The
        ranking converges early."""
        return max(4, self.samples // 4) if self.samples >= 4 else self.samples

    @property
    def shift_rows(self) -> int:
        """Number of sequences for the mean shift of the hidden states. It is a first moment, so a few are enough."""
        return max(2, self.scoring_rows // 2)

    @property
    def selection_rows(self) -> int:
        """Number of held-out sequences that decide between candidate sets of layers and between ridge strengths."""
        return max(4, self.samples // 4)

    @property
    def swaps(self) -> bool:
        """Whether the search exchanges single layers of the best set. Only without compensation: swaps scatter the
        gaps, and compensation reverses their gain (docs/method.md)."""
        return self.metric == "auto" and self.schedule == "oneshot" and self.compensation == "none"


@dataclass(frozen=True)
class PruneConfig(PruneMethod):
    """How to prune, and how much: exactly one of `ratio`, `layers`, `drop`.

    Raises:
        UsageError: a value outside its range, or not exactly one of the three.
    """

    ratio: float | None = option(None, "Share of the decoder layers to remove, between 0 and 1 (0.25 = a quarter).")
    layers: int | None = option(None, "Number of decoder layers to remove.")
    drop: tuple[int, ...] | None = option(None, "Indices of the decoder layers to remove, such as 12,13,14.")

    def __post_init__(self) -> None:
        asked = [value for value in (self.ratio, self.layers, self.drop) if value is not None]
        if len(asked) != 1:
            raise UsageError("Give exactly one of --ratio, --layers and --drop.")
        if self.ratio is not None and (not math.isfinite(self.ratio) or not 0 < self.ratio < 1):
            raise UsageError(f"--ratio must lie between 0 and 1, both excluded; got {self.ratio:g}.")
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"--layers must be at least 1; got {self.layers}.")
        if self.drop is not None and (not self.drop or min(self.drop) < 0 or len(set(self.drop)) < len(self.drop)):
            raise UsageError("--drop takes distinct layer indices, counted from 0.")
        super().__post_init__()

    def removals(self, layer_count: int) -> int:
        """How many of `layer_count` layers to remove; a ratio as in `removals_of_ratio`.

        Raises:
            UsageError: it would remove all layers, or a layer that the model does not have.
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
            assert self.layers is not None  # checked by __post_init__
            wanted = self.layers
        if wanted >= layer_count:
            raise UsageError(f"Cannot remove {wanted} of {layer_count} layers: at least one must remain.")
        return wanted


class MethodOptions(TypedDict, total=False):
    """The fields of `PruneMethod` as keyword arguments."""

    metric: str
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
    heal: str
    heal_text: tuple[str, ...]
    heal_part: str
    device: Device
    compute: Compute


def removals_of_ratio(ratio: float, layer_count: int) -> int:
    """How many of `layer_count` layers a ratio removes: round half up, at least one, at most all but one."""
    return min(max(math.floor(ratio * layer_count + 0.5), 1), layer_count - 1)


Method = TypeVar("Method", bound=PruneMethod)


def paper_preset(config: Method) -> Method:
    """The settings of the GradMAP paper (arXiv 2602.14649): gradient ranking, and one projection at the layer of the
    largest mean shift."""
    return dataclasses.replace(config, metric="gradient", compensation="projection", site="largest-shift")


@dataclass(frozen=True)
class Expected:
    """What must be unchanged for a run to reproduce an earlier one. A field that is None is not checked.

    `commit`: of the original on the Hub. `weights_sha256`: of a local original. `rows_sha256`: of the token ids of the
    calibration sequences.
    """

    commit: str | None = None
    weights_sha256: str | None = None
    rows_sha256: str | None = None


# What --space takes; True and False are auto and none.
SPACE_KINDS = ("auto", "gradio", "browser", "zero", "none")


@dataclass(frozen=True)
class PublishConfig:
    """Where and how to publish a finished model.

    Raises:
        UsageError: an unknown kind of Space, or a negative `wait_space`.
    """

    to: str | None = option(None, "Target repository OWNER/NAME; default: your account, name of the output folder.")
    space: str | bool = option(
        "auto",
        "Kind of comparison Space: gradio (an app on a CPU, for accounts with a paid plan), browser (a page: both "
        "models run in the visitor's browser), zero (the app on ZeroGPU), none; auto: gradio with a paid plan, else "
        "browser if both models fit into one, else zero.",
    )
    public: bool = option(False, "Make both repositories public, after everything is verified.")
    update: bool = option(False, "Replace an earlier push of the same model to the same target, in one commit.")
    create_pr: bool = option(
        False, "Propose the model to somebody else's repository (--to) as a pull request, without a Space."
    )
    license: str | None = option(None, "Licence id for the card, if the original states none.")
    license_name: str | None = option(None, "Name of the licence, if its id is `other`.")
    license_link: str | None = option(None, "Text of that licence: a URL, or a file such as LICENSE.")
    collection: str | None = option(
        None,
        "Also add model and Space to this collection, OWNER/SLUG or [OWNER/]TITLE; a missing one is created, private.",
    )
    wait_space: int = option(
        300, "Seconds to wait for the published Space to build and start, which continues on the Hub. 0: do not wait."
    )

    def __post_init__(self) -> None:
        if isinstance(self.space, bool):
            object.__setattr__(self, "space", "auto" if self.space else "none")
        if self.space not in SPACE_KINDS:
            raise UsageError(f"--space takes {', '.join(SPACE_KINDS)}; got {self.space!r}.")
        if self.wait_space < 0:
            raise UsageError(f"--wait-space must be at least 0 seconds; got {self.wait_space}.")


class PublishOptions(TypedDict, total=False):
    """The fields of `PublishConfig` as keyword arguments."""

    to: str | None
    space: str | bool
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
    """What to prune, and where to write and publish the result. `repeats`: what must match the run that `--from`
    repeats; None without it."""

    model: str = option("", "A Hub id (org/model), a local folder, or a .gguf file.")
    prune: PruneConfig = field(default_factory=lambda: PruneConfig(ratio=0.25))
    revision: str | None = option(None, "Branch, tag or commit of the original.")
    output: Path | None = option(None, "Folder for the result; default: NAME-gradmap-PERCENT here.")
    onnx: bool = option(True, "Export to ONNX with KV cache.")
    quantize: tuple[str, ...] = option(
        (),
        "Further ONNX files, comma-separated: int8 (weights in 8 bits), int4, genai, fp16. Each is compared with "
        "PyTorch; a file that raises perplexity by more than 2 % (int8) or 10 % (int4) is not published.",
    )
    resume: bool = option(False, "Continue an unfinished run in the output folder.")
    trust_remote_code: bool = option(False, "Not supported: models that need their own code are refused.")
    repeats: Expected | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        strange = [name for name in self.quantize if name not in quantized()]
        if strange:
            raise UsageError(f"--quantize takes {', '.join(quantized())}; got {strange[0]!r}.")
        if self.quantize and not self.onnx:
            raise UsageError("--quantize writes ONNX files; leave out --no-onnx.")


@dataclass(frozen=True)
class SweepConfig:
    """The model of a sweep, its ratios, and the method (`prune`) by which it is pruned at each.

    Raises:
        UsageError: no ratio, a ratio that is not between 0 and 1, or a negative `max_loss`.
    """

    model: str = option("", help_of(PushConfig, "model"))
    ratios: tuple[float, ...] = option(
        (0.1, 0.2, 0.3), "Shares of the decoder layers to remove, comma-separated, each between 0 and 1."
    )
    prune: PruneMethod = field(default_factory=PruneMethod)
    revision: str | None = option(None, help_of(PushConfig, "revision"))
    output: Path | None = option(None, "Folder for sweep.json, sweep.md and sweep.png; default: NAME-sweep here.")
    speed: bool = option(
        True, "Measure prefill and decode speed of the pruned model against the original (PyTorch, batch 1)."
    )
    max_loss: float | None = option(
        None, "Recommend the largest ratio at which perplexity rises by at most N percent, instead of the knee."
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
        """{number of layers to remove of `layer_count`: the ratios that round to it}, in ascending order."""
        found: dict[int, list[float]] = {}
        for ratio in sorted(set(self.ratios)):
            found.setdefault(removals_of_ratio(ratio, layer_count), []).append(ratio)
        return found

    def push_command(self, ratio: float) -> str:
        """The command line that prunes and publishes at this ratio, with the options of the sweep."""
        words = ["gradmap-hub", "push", self.model, "--ratio", str(ratio)]
        words += ["--revision", self.revision] if self.revision else []
        by_default = PruneMethod()
        paper = paper_preset(by_default)
        if self.prune.site == paper.site:  # the site has no option of its own
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
