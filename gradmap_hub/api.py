"""The Python API: one function per command, with the command's own options and defaults, and `load`.

Import the names from `gradmap_hub`; the heavy packages load when a function is first called. Every function except
`load` takes a `reporter` (see `gradmap_hub.progress.Reporter`) that receives stages and steps; by default nothing is
printed. Expected failures are subclasses of `gradmap_hub.errors.GradmapError`, with `message` and `hint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
    DEFAULT_EVALUATION,
    MethodOptions,
    PruneConfig,
    PruneMethod,
    PublishConfig,
    PublishOptions,
    PushConfig,
    SweepConfig,
)
from gradmap_hub.folder_config import EvaluateConfig, HealConfig
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from gradmap_hub.pipeline.inspect import Inspection
    from gradmap_hub.pipeline.publish import PushResult
    from gradmap_hub.runtime import TextModel
    from gradmap_hub.sweeping.record import SweepRecord

StrPath = str | Path


def prune(
    model: StrPath,
    output: StrPath,
    *,
    ratio: float | None = None,
    layers: int | None = None,
    drop: Sequence[int] | None = None,
    revision: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **method: Unpack[MethodOptions],
) -> RunRecord:
    """Prune a model into a folder: checkpoint, tokenizer, card and gradmap.json. Publishes nothing.

    Args:
        model: A Hub id, a local folder, or a .gguf file.
        output: Folder for the result; new or empty.
        ratio: Share of the decoder layers to remove; 0.25 if `layers` and `drop` are not given either.
        layers: Number of decoder layers to remove.
        drop: Indices of the decoder layers to remove.
        revision: Branch, tag or commit of the original.
        resume: Resume an unfinished run in `output`.
        reporter: Receives stages and steps; by default nothing is printed.
        method: Fields of `PruneMethod`, such as `calibration=("text.txt",)`, `samples=64`, `heal="500k"`.

    Returns:
        The record of the run, as written to `gradmap.json` in `output`.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import prune
        >>> record = prune("HuggingFaceTB/SmolLM2-135M-Instruct", "small", ratio=0.25)
        >>> record.removed, record.evaluation.after
    """
    from gradmap_hub.pipeline.prune import prune as run

    config = _prune_config(ratio, layers, drop, method)
    return run(str(model), Path(output), config, revision=revision, resume=resume, reporter=reporter)


def heal(
    folder: StrPath,
    *,
    tokens: int | None = None,
    time: str | None = None,
    text: Sequence[str] = (),
    part: str = "auto",
    against: str | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Distil the original into a pruned folder, and rewrite its weights, exports, record and card.

    The folder changes only if the training clearly lowers the held-out divergence from the original. The same call
    resumes an interrupted one.

    Args:
        folder: A folder made by `prune` or `push`.
        tokens: Number of tokens to train on. Give exactly one of `tokens` and `time`.
        time: Approximate duration, such as "90s", "30m" or "2h".
        text: Texts to train on: files, Hub datasets, or "self" for text that the original generates. Default: the
            calibration text, and also "self" for a model with a chat template.
        part: The weights to train: all, gaps (the layers around the gaps), lora, or auto, the largest part that fits
            into memory.
        against: The original: a Hub id or a folder. Default: the recorded one.
        reporter: Receives stages and steps; by default nothing is printed.

    Returns:
        The record of the folder; its `heal` has the settings, and losses and divergences before and after.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import heal
        >>> healed = heal("small", tokens=500_000, text=["notes.txt", "self"]).heal
        >>> healed.divergence_before, healed.divergence_after
    """
    from gradmap_hub.pipeline.heal_folder import heal_folder

    config = HealConfig(None if tokens is None else str(tokens), time, tuple(text), part, against)
    return heal_folder(Path(folder), config, reporter=reporter)


def inspect(
    model: StrPath,
    *,
    ratios: Sequence[float] = (0.1, 0.25),
    revision: str | None = None,
    reporter: Reporter | None = None,
    **method: Unpack[MethodOptions],
) -> Inspection:
    """Score the layers of a model and choose the layers to remove at each ratio; nothing is written.

    Args:
        model: A Hub id, a local folder, or a .gguf file.
        ratios: Shares of the decoder layers to remove, each between 0 and 1.
        revision: Branch, tag or commit of the model.
        reporter: Receives stages and steps; by default nothing is printed.
        method: Fields of `PruneMethod`, such as `calibration` and `samples`.

    Returns:
        `scores`, every metric of each layer, and `choices`, for each ratio the layers that the better of two quick
        rankings removes.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import inspect
        >>> inspect("HuggingFaceTB/SmolLM2-135M-Instruct", ratios=(0.25,)).choices[0.25].removed
    """
    from gradmap_hub.pipeline.inspect import inspect as run

    return run(str(model), PruneMethod(**method), ratios=ratios, revision=revision, reporter=reporter)


def push(
    model: StrPath,
    *,
    ratio: float | None = None,
    layers: int | None = None,
    drop: Sequence[int] | None = None,
    output: StrPath | None = None,
    onnx: bool = True,
    quantize: Sequence[str] = (),
    revision: str | None = None,
    resume: bool = False,
    publish_options: PublishConfig | None = None,
    reporter: Reporter | None = None,
    **method: Unpack[MethodOptions],
) -> PushResult:
    """Prune, verify, measure and export a model, publish it with a card and a Space, and verify the published files.

    The Hub and the token are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`, `hf auth login`).

    Args:
        model: A Hub id, a local folder, or a .gguf file.
        ratio: Share of the decoder layers to remove; 0.25 if `layers` and `drop` are not given either.
        layers: Number of decoder layers to remove.
        drop: Indices of the decoder layers to remove.
        output: Folder for the result; by default NAME-gradmap-PERCENT in the current folder.
        onnx: Export to ONNX with KV cache.
        quantize: Further ONNX files: int8, int4, genai, fp16.
        revision: Branch, tag or commit of the original.
        resume: Resume an unfinished run in `output`.
        publish_options: Target, visibility, licence, collection; by default private, under your account.
        reporter: Receives stages and steps; by default nothing is printed.
        method: Fields of `PruneMethod`.

    Returns:
        The record, and the URLs and commits of model and Space.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import PublishConfig, push
        >>> pushed = push("org/model", ratio=0.25, publish_options=PublishConfig(to="me/model-small"))
        >>> pushed.model.url
    """
    from gradmap_hub.pipeline.push import push as run

    publish_config = publish_options or PublishConfig()
    config = PushConfig(
        **{entry.name: getattr(publish_config, entry.name) for entry in fields(PublishConfig)},
        model=str(model),
        prune=_prune_config(ratio, layers, drop, method),
        revision=revision,
        output=None if output is None else Path(output),
        onnx=onnx,
        quantize=tuple(quantize),
        resume=resume,
    )
    return run(config, reporter=reporter)


def export(
    folder: StrPath,
    formats: Sequence[str] = ("onnx",),
    *,
    text: str = DEFAULT_CALIBRATION,
    keep_failing: bool = False,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Export a pruned folder to ONNX with KV cache, and compare every file with PyTorch.

    Args:
        folder: A folder made by `prune` or `push`.
        formats: onnx (float32, Optimum's graph), int8, int4, genai (float32, the graph of ONNX Runtime GenAI's model
            builder), fp16.
        text: Text for the perplexity of formats other than onnx: a file, or a Hub dataset.
        keep_failing: Keep a quantised file whose perplexity exceeds the checkpoint's by more than its format allows
            (int8: 2 %, int4: 10 %).
        reporter: Receives stages and steps; by default nothing is printed.

    Returns:
        The record of the folder; its `artifacts` list every file with its size, sha256 and perplexity.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import export
        >>> [entry.path for entry in export("small", ["onnx", "int8"], text="notes.txt").artifacts]
    """
    from gradmap_hub.pipeline.export import export_folder

    return export_folder(Path(folder), list(formats), text=text, keep_failing=keep_failing, reporter=reporter)


def evaluate(
    folder: StrPath,
    *,
    against: str | None = None,
    text: Sequence[str] = (DEFAULT_EVALUATION,),
    tasks: Sequence[str] = (),
    tasks_from: StrPath | None = None,
    limit: int | None = None,
    seq_len: int = 512,
    rows: int = 32,
    speed: bool = True,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Measure a pruned folder and its original on the same text, tasks and machine; record and card are rewritten.

    Args:
        folder: A folder made by `prune` or `push`.
        against: The original: a Hub id or a folder. Default: the recorded one.
        text: Texts to measure perplexity and agreement on: files, or Hub datasets.
        tasks: Tasks of lm-evaluation-harness; "paper" for the seven tasks of the paper.
        tasks_from: Folder with the documents of the tasks as NAME.SPLIT.jsonl, in place of a download.
        limit: Use only the first `limit` documents of each task.
        seq_len: Tokens per sequence.
        rows: Maximum number of sequences of each text, spread evenly over it.
        speed: Measure tokens per second and peak memory.
        reporter: Receives stages and steps; by default nothing is printed.

    Returns:
        The record of the folder; `measured` holds the results.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import evaluate
        >>> found = evaluate("small", text=["wiki.txt"]).measured.texts[0]
        >>> found.pruned / found.original, found.interval
    """
    from gradmap_hub.pipeline.evaluate import evaluate_folder

    config = EvaluateConfig(
        against=against,
        text=tuple(text),
        tasks=tuple(tasks),
        tasks_from=None if tasks_from is None else Path(tasks_from),
        limit=limit,
        seq_len=seq_len,
        rows=rows,
        speed=speed,
    )
    return evaluate_folder(Path(folder), config, reporter=reporter)


def sweep(
    model: StrPath,
    *,
    ratios: Sequence[float] = (0.1, 0.2, 0.3),
    output: StrPath | None = None,
    revision: str | None = None,
    speed: bool = True,
    max_loss: float | None = None,
    reporter: Reporter | None = None,
    **method: Unpack[MethodOptions],
) -> SweepRecord:
    """Measure quality, size and speed of a model pruned at several ratios, with one scoring pass.

    Args:
        model: A Hub id, a local folder, or a .gguf file.
        ratios: Shares of the decoder layers to remove, each between 0 and 1.
        output: Folder for sweep.json, sweep.md and sweep.png; by default NAME-sweep in the current folder.
        revision: Branch, tag or commit of the original.
        speed: Time the pruned model against the original.
        max_loss: Recommend the largest ratio at which perplexity rises by at most `max_loss` percent, instead of
            the knee.
        reporter: Receives stages and steps; by default nothing is printed.
        method: Fields of `PruneMethod`.

    Returns:
        `points`, the results for each number of removed layers, and `recommendation`.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import sweep
        >>> sweep("HuggingFaceTB/SmolLM2-135M-Instruct", ratios=(0.1, 0.25)).recommendation.ratio
    """
    from gradmap_hub.pipeline.sweep import sweep as run

    config = SweepConfig(
        model=str(model),
        ratios=tuple(ratios),
        prune=PruneMethod(**method),
        revision=revision,
        output=None if output is None else Path(output),
        speed=speed,
        max_loss=max_loss,
    )
    return run(config, reporter=reporter)[0]


def publish(folder: StrPath, *, reporter: Reporter | None = None, **options: Unpack[PublishOptions]) -> PushResult:
    """Upload a folder made by `prune` or `push`, with its Space folder if there is one, and verify what was published.

    Args:
        folder: A folder made by `prune` or `push`.
        reporter: Receives stages and steps; by default nothing is printed.
        options: Fields of `PublishConfig`: `to`, `space`, `public`, `update`, `create_pr`, `license`, `license_name`,
            `license_link`, `collection`, `wait_space`.

    Returns:
        The record, and the URLs and commits of model and Space.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import publish
        >>> publish("small", to="me/model-small").model.url
    """
    from gradmap_hub.pipeline.publish import publish_folder

    return publish_folder(Path(folder), PublishConfig(**options), reporter=reporter)


def load(
    model: StrPath,
    *,
    artifact: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    revision: str | None = None,
) -> TextModel:
    """Load the ONNX files of a model folder or Hub repository for text generation. Does not need torch.

    Args:
        model: A folder with `onnx/`, or a Hub id.
        artifact: The file to load: int8, int4, fp16, fp32, genai; auto: the best for the machine.
        provider: Execution provider of ONNX Runtime: cpu, cuda; auto: CUDA on a machine with a GPU, else the CPU.
        threads: Threads per decoding step; by default all processors that this process may use.
        context: Maximum number of tokens of prompt and answer together; by default the model's limit, at most 4096.
        revision: Branch, tag or commit of the repository.

    Returns:
        The loaded model; `start` begins a generation.

    Raises:
        GradmapError: one of its subclasses says what is wrong.

    Example:
        >>> from gradmap_hub import load
        >>> model = load("me/model-gradmap-25")
        >>> answer = model.start(model.encode_chat([{"role": "user", "content": "Hello"}]), max_tokens=64)
        >>> print("".join(answer))
    """
    from gradmap_hub.runtime import load as run

    return run(model, artifact=artifact, provider=provider, threads=threads, context=context, revision=revision)


def _prune_config(ratio: float | None, layers: int | None, drop: Sequence[int] | None, method: Any) -> PruneConfig:
    if ratio is None and layers is None and drop is None:
        ratio = 0.25
    return PruneConfig(ratio=ratio, layers=layers, drop=None if drop is None else tuple(drop), **method)
