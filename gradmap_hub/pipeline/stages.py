"""The stages that `prune`, `heal`, `inspect` and `sweep` share; finished ones are loaded from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.config import WITHOUT_WEIGHTS
from gradmap_hub.errors import SourceError
from gradmap_hub.layout import weights_sha256
from gradmap_hub.pipeline.run import Run
from gradmap_hub.pipeline.texts import EvaluationText
from gradmap_hub.pruning.prune_model import Compensated, Overrides, Selected, compensate_layers, select_layers
from gradmap_hub.record import CompensationRecord, EvaluationRecord, HealRecord, TextPerplexity
from gradmap_hub.units import ranges, size

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.pruning.scores import LayerScores

# Files in the work folder with changed weights; the keys are "layer:parameter name within the layer".
COMPENSATION_FILE, HEALED_FILE = "correction.safetensors", "healed.safetensors"
# Most unused tensors that a record names; a checkpoint may have any number of them.
MOST_UNUSED = 1000


@dataclass(frozen=True)
class OriginalWeights:
    """Size of the original's weight files; `sha256`: only of local weights, which have no commit; `unused`: names of
    checkpoint tensors that its model class does not have, at most MOST_UNUSED."""

    bytes: int
    sha256: str | None = None
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowLosses:
    """Per evaluation text, the mean NLL of each sequence in nats per token."""

    rows: list[list[float]]


def fetch_weights(run: Run) -> OriginalWeights:
    """Download the original's weights, unless they are local.

    Raises:
        SourceError: they differ from those of the run to repeat.
    """

    def compute() -> OriginalWeights:
        folder = run.original.checkpoint()
        weights = list(folder.glob("*.safetensors"))
        local = [run.source.gguf] if run.source.gguf else weights if run.source.folder else []
        return OriginalWeights(
            sum(path.stat().st_size for path in weights),
            weights_sha256(local) if local else None,
            run.original.unused[:MOST_UNUSED],
        )

    fetched = run.stages.run(
        "pull", f"Fetching {run.source.base.name}", OriginalWeights, compute, describe=lambda found: size(found.bytes)
    )
    expected = run.expected.weights_sha256
    if expected is not None and fetched.sha256 != expected:
        raise SourceError(
            f"{run.source.base.name} is not the recorded original: the sha256 of its weights differs.",
            hint="Give the folder or file that the first run used, or leave out --from to make a different model.",
        )
    return fetched


def score(run: Run, rows: CalibrationRows, *, every: bool = False) -> LayerScores:
    """Score all layers on the first `scoring_rows` calibration sequences. `every`: compute the weight gradients even if
    the metric of the run does not need them."""
    from gradmap_hub.pruning.scores import LayerScores
    from gradmap_hub.pruning.scoring import score_layers

    scoring = rows.fit[: run.method.scoring_rows]
    weights = every or run.method.metric not in WITHOUT_WEIGHTS

    def compute() -> LayerScores:
        decoder = run.decoder()
        run.reporter.total(len(scoring))
        return score_layers(decoder, scoring, weights=weights, row_done=run.reporter.advance)

    return run.stages.run(
        "score",
        "Scoring layers",
        LayerScores,
        compute,
        inputs={
            "rows": rows.sha256,
            "count": len(scoring),
            "precision": [str(value) for value in run.precision()],
            "weights": weights,
        },
        describe=lambda scores: f"{len(scores.layers)} layers, one backward pass over {scoring.numel():,} tokens",
    )


def select(
    run: Run, rows: CalibrationRows, scores: LayerScores, removals: int, drop: Sequence[int] | None = None
) -> Selected:
    """Measure candidate sets of `removals` layers on held-out sequences. `drop`: the user's choice of layers."""
    from gradmap_hub.data.rows import sha256_of_ids

    method = run.method
    return run.stages.run(
        "select",
        "Choosing layers on held-out sequences",
        Selected,
        lambda: select_layers(run.decoder(), rows, scores, method, removals, drop=drop, reporter=run.reporter),
        inputs={
            "drop": drop,
            "removals": removals,
            "metric": method.metric,
            "schedule": method.schedule,
            "swaps": method.swaps and drop is None,
            "rows": sha256_of_ids(rows.selection),
        },
        describe=lambda found: f"{len(found.candidates)} sets measured, best {ranges(found.candidates[0].removed)}",
    )


def compensate(run: Run, rows: CalibrationRows, selected: Selected) -> Compensated:
    """Fit the compensation for the best few sets of layers, and choose the set with the lowest loss after it."""
    file = run.work / COMPENSATION_FILE

    def compute() -> Compensated:
        file.unlink(missing_ok=True)
        chosen, overrides = compensate_layers(run.decoder(), rows, selected, run.method, reporter=run.reporter)
        save_overrides(overrides, file)
        return chosen

    return run.stages.run(
        "compensate",
        "Compensating the drift",
        Compensated,
        compute,
        inputs={"kind": run.method.compensation, "site": run.method.site, "samples": run.method.samples},
        files=lambda: [file],
        describe=lambda found: f"remove {ranges(found.removed)}; {_compensation_summary(found.compensation)}",
    )


def _compensation_summary(record: CompensationRecord) -> str:
    if not record.applied:
        return record.reason
    places = ", ".join(f"{entry.layer} {entry.part}" for entry in record.corrections)
    return f"compensation at {places}: held-out loss {record.loss_before:.3f} -> {record.loss_after:.3f}"


def new_values(run: Run, compensation: CompensationRecord, healed: HealRecord | None) -> Overrides:
    """The weights that compensation and healing changed, by layer and parameter name, from the work folder."""
    overrides = load_overrides(run.work / COMPENSATION_FILE) if compensation.applied else {}
    if healed is not None and healed.applied:  # they started from the compensated values and replace them
        overrides |= load_overrides(run.work / HEALED_FILE)
    return overrides


def save_overrides(overrides: Mapping[tuple[int, str], Any], path: Path) -> None:
    """Write changed weights as safetensors, with the keys "layer:parameter name"."""
    from safetensors.torch import save_file

    save_file({f"{layer}:{name}": value for (layer, name), value in overrides.items()}, path)


def load_overrides(path: Path) -> Overrides:
    """The weights that `save_overrides` wrote."""
    from safetensors.torch import load_file

    split = {key.partition(":")[::2]: value for key, value in load_file(path).items()}
    return {(int(layer), name): value for (layer, name), value in split.items()}


def losses_without(run: Run, sets: Sequence[Sequence[int]], texts: Sequence[Rows]) -> list[list[list[float]]]:
    """Losses of the original without each of `sets` of layers.

    Returns:
        Per set and text, the mean NLL of each sequence in nats per token.
    """
    decoder = run.decoder()
    kept = [[layer for layer in range(decoder.count) if layer not in removed] for removed in sets]
    measured = [decoder.losses_of(text.ids, kept, run.reporter.advance) for text in texts]
    return [[of_text[index] for of_text in measured] for index in range(len(sets))]


def texts_inputs(run: Run, texts: Sequence[Rows]) -> dict[str, Any]:
    """The inputs of a stage that measures on these texts."""
    return {"texts": [(text.sha256, len(text.ids)) for text in texts], "seq_len": run.method.seq_len}


def evaluation_record(
    run: Run,
    texts: Sequence[EvaluationText],
    original: Sequence[Sequence[float]],
    pruned: Sequence[Sequence[float]],
    compensated: Sequence[Sequence[float]],
) -> EvaluationRecord:
    """Perplexities, and the interval of the ratio result / original, from losses.

    Args:
        original: Per text, the mean NLL of each sequence in nats per token, for the original.
        pruned: The same for the pruned model before compensation and healing; where a finished folder is healed, for
            the folder before that.
        compensated: The same for the final model, after compensation and healing if any.
    """
    from gradmap_hub.evaluation.metrics import perplexity, ratio_interval

    measured = [
        TextPerplexity(
            name=text.rows.name,
            kind=text.kind,
            rows=len(text.rows.ids),
            tokens=text.rows.ids.numel(),
            sequence_length=run.method.seq_len,
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
