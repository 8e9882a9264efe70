"""Perplexity of both models, and the metrics of `METRICS`, on the same sequences of each text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradmap_hub.data.rows import Rows, sha256_of_ids
from gradmap_hub.evaluation import metrics
from gradmap_hub.evaluation.measurement import ORIGINAL, PRUNED, Context, Step
from gradmap_hub.evaluation.metrics import Comparison, mean_interval, perplexity, ratio_interval
from gradmap_hub.measurements import MeasuredText, TextMetric


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes:
        name: Name in the record, of the characters `[a-z0-9_]`.
        compute: See `metrics.Metric`.
        title: Heading on card and terminal. Default: `name`.
        share: Values are between 0 and 1 and shown as percentages.
    """

    name: str
    compute: metrics.Metric
    title: str = ""
    share: bool = False


# `MeasuredText` has fields and titles for the first two; all others are in its `further`.
METRICS = [
    Metric("agreement", metrics.top1_agreement),
    Metric("divergence", metrics.kl_divergence),
]


@dataclass(frozen=True)
class Losses:
    """Mean NLL of each sequence."""

    rows: list[float]

    def __str__(self) -> str:
        return f"perplexity {perplexity(self.rows):.2f}"


def step_name(which: str, rows: Rows) -> str:
    return f"{which}-text-{rows.sha256[:8]}"


def rows_inputs(rows: Rows) -> dict[str, Any]:
    return {"rows": sha256_of_ids(rows.ids), "shape": list(rows.ids.shape)}


def steps(context: Context) -> list[Step[Any]]:
    """Two steps per text: the original, then the pruned model."""
    return [step for rows in context.texts for step in (_original(context, rows), _pruned(context, rows))]


def _original(context: Context, rows: Rows) -> Step[Losses]:
    return Step(
        step_name(ORIGINAL, rows),
        f"Original on {rows.name}",
        Losses,
        lambda: Losses(_store_states(context, rows)),
        weights=(ORIGINAL,),
        inputs=rows_inputs(rows),
        loads=ORIGINAL,
        describe=str,
    )


def _pruned(context: Context, rows: Rows) -> Step[Comparison]:
    computed = {metric.name: metric.compute for metric in METRICS}

    def compute() -> Comparison:
        states, head = _load_states(context, rows)
        decoder = context.models.decoder(PRUNED)
        context.reporter.total(len(rows.ids))
        return metrics.compare_rows(decoder, rows.ids, states, head, computed, context.reporter.advance)

    return Step(
        step_name(PRUNED, rows),
        f"Pruned on {rows.name}",
        Comparison,
        compute,
        weights=(ORIGINAL, PRUNED),
        inputs={**rows_inputs(rows), "metrics": sorted(computed)},
        loads=PRUNED,
        describe=lambda found: f"perplexity {perplexity(found.losses):.2f}",
    )


def result(context: Context, found: Mapping[str, Any]) -> list[MeasuredText]:
    return [_text(rows, *(found[step_name(which, rows)] for which in (ORIGINAL, PRUNED))) for rows in context.texts]


def _text(rows: Rows, original: Losses, pruned: Comparison) -> MeasuredText:
    values = {metric.name: _mean(metric, pruned.metrics[metric.name]) for metric in METRICS}
    agreement, divergence = values.pop("agreement"), values.pop("divergence")
    return MeasuredText(
        name=rows.name,
        sha256=rows.sha256,
        rows=len(rows.ids),
        tokens=rows.ids.numel(),
        sequence_length=rows.ids.shape[1],
        original=perplexity(original.rows),
        pruned=perplexity(pruned.losses),
        interval=ratio_interval(original.rows, pruned.losses),
        agreement=agreement.value,
        agreement_interval=agreement.interval,
        divergence=divergence.value,
        divergence_interval=divergence.interval,
        further=list(values.values()),
    )


def _mean(metric: Metric, values: list[float]) -> TextMetric:
    title = metric.title or metric.name
    return TextMetric(metric.name, title, sum(values) / len(values), mean_interval(values), metric.share)


# -- states of the original ------------------------------------------------------------------------------------------


def _store_states(context: Context, rows: Rows) -> list[float]:
    """Mean NLL of each sequence under the original; stores its states and its output head for the comparison."""
    decoder = context.models.decoder(ORIGINAL)
    context.reporter.total(len(rows.ids))
    losses, states = metrics.reference_states(decoder, rows.ids, context.reporter.advance)
    _save({"states": states}, _states_file(context, rows))
    _save({name: value.detach().cpu() for name, value in decoder.output.state_dict().items()}, _head_file(context))
    return losses


def _load_states(context: Context, rows: Rows) -> tuple[Tensor, nn.Linear]:
    """The original's states after the final norm (rows, tokens, d) and its output embedding."""
    if not (_states_file(context, rows).is_file() and _head_file(context).is_file()):
        _store_states(context, rows)  # deleted after an earlier evaluation
    states = load_file(_states_file(context, rows))["states"]
    parts = load_file(_head_file(context))
    count, width = parts["weight"].shape
    head = nn.Linear(width, count, bias="bias" in parts, device="meta")
    head.load_state_dict(parts, assign=True)
    return states, head.requires_grad_(False)


def _states_file(context: Context, rows: Rows) -> Path:
    models = context.models
    key = repr((models.sha256[ORIGINAL], rows_inputs(rows), (models.dtype, models.device)))
    return context.work / f"evaluate-states-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _head_file(context: Context) -> Path:
    return context.work / f"evaluate-head-{context.models.sha256[ORIGINAL][:16]}.safetensors"


def delete_states(work: Path) -> None:
    """Delete all stored states and output heads in `work`, also those of an evaluation that was killed: they are
    large."""
    for path in (*work.glob("evaluate-states-*"), *work.glob("evaluate-head-*")):
        path.unlink(missing_ok=True)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)  # complete or not there
