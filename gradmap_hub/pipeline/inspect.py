"""`inspect`: scores the layers of a model and chooses the ones to remove at each ratio; writes no result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.config import PruneMethod, removals_of_ratio
from gradmap_hub.data.texts import check_texts
from gradmap_hub.models.source import check_family, find_source
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.run import Run
from gradmap_hub.pipeline.stages import score
from gradmap_hub.pipeline.texts import calibrate
from gradmap_hub.progress import Reporter
from gradmap_hub.record import Candidate

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pruning.scores import LayerScores


@dataclass(frozen=True)
class Inspection:
    """Scores of all layers. `choices`: ratio -> the layers that the better of two cheap rankings removes, with the
    held-out loss without them."""

    scores: LayerScores
    choices: dict[float, Candidate]


def inspect(
    model: str,
    method: PruneMethod | None = None,
    *,
    ratios: Sequence[float] = (0.1, 0.25),
    revision: str | None = None,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> Inspection:
    """Score the layers of `model` and choose layers at each ratio by the better of two cheap rankings.

    Args:
        model: A Hub id, a local folder or a .gguf file.
        method: How to calibrate and score.
        ratios: Shares of the layers to remove, each between 0 and 1.
        revision: Branch, tag or commit of the model.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    import tempfile

    method = method or PruneMethod()
    hub, reporter = connect(hub, reporter)
    check_texts(method)
    source = find_source(model, revision, hub)
    check_family(source, method)
    from gradmap_hub.pruning.candidates import candidates
    from gradmap_hub.pruning.search import Search

    with tempfile.TemporaryDirectory(prefix="gradmap-inspect-") as scratch:
        run = Run(source, method, Path(scratch) / "model", hub, reporter)
        rows, _ = calibrate(run)
        scores = score(run, rows, every=True)
        reporter.start("Measuring the model without the chosen layers")
        reporter.total(2 * len(ratios) * len(rows.selection))
        choices: dict[float, Candidate] = {}
        for ratio in ratios:
            count = removals_of_ratio(ratio, len(scores.layers))
            search = Search(run.decoder(), rows.selection, reporter.advance)
            for metric in ("block-influence", "cosine-window"):
                search.loss(candidates(scores, count, metric)[metric], metric)
            choices[ratio] = search.ranked()[0]
        reporter.finish(f"{len(choices)} ratios")
        return Inspection(scores, choices)
