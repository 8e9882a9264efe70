"""`push`: checks everything first, then prunes, exports, writes card and Space, and publishes.

Each stage takes the record and returns it with its additions. Its result is on disk before the next stage begins, so
that a run can be resumed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmap_hub.config import PushConfig
from gradmap_hub.evaluation.staleness import with_earlier
from gradmap_hub.formats import quantized
from gradmap_hub.layout import space_folder_of
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.export import export_checked, export_optimum, remove_exports, remove_onnx
from gradmap_hub.pipeline.opening import check_opens
from gradmap_hub.pipeline.plan import PushPlan, check_companions, make_plan, published_models
from gradmap_hub.pipeline.prune import prune_stages
from gradmap_hub.pipeline.publish import PushResult, publish_both
from gradmap_hub.pipeline.results import write_results
from gradmap_hub.pipeline.run import Run, exclusive, no_empty_folders
from gradmap_hub.pipeline.space import browser_page, remove_space, write_space_folder
from gradmap_hub.pipeline.texts import export_rows
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord
from gradmap_hub.space import vendor
from gradmap_hub.space.plan import plan_of

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub


@dataclass(frozen=True)
class _ExportText:
    """Sequences to measure exports on (`held_out`) and token ids to fit them on (`fit`, (sequences, tokens)); None if
    no export needs them."""

    held_out: Rows | None = None
    fit: Tensor | None = None


def push(
    config: PushConfig, *, command: str = "", reporter: Reporter | None = None, hub: Hub | None = None
) -> PushResult:
    """Prune, export, write card and Space, publish both, and verify the published files.

    Args:
        config: What to prune and how, the formats, the targets.
        command: The command line, for the record.

    Raises:
        GradmapError: one of its subclasses says what is wrong; see errors.py.
    """
    from gradmap_hub.exporters import environment
    from gradmap_hub.hub.publisher import Publisher

    hub, reporter = connect(hub, reporter)
    plan = make_plan(config, hub)
    if config.onnx:
        environment.prepare(reporter)  # now, so that a failure costs no work
    if plan.targets.kinds.order[:1] == ("browser",):
        vendor.fetch(reporter)  # as above
    with no_empty_folders(plan.output), exclusive(plan.output):
        run = Run(plan.source, config.prune, plan.output, hub, reporter, command=command, expected=config.repeats)
        if plan.source.base.repo_id is not None and plan.source.files.companions:
            check_companions(plan.source, run.original.companions(), hub)  # those of a folder were checked by the plan
        record = prune_stages(run, config.prune, target=plan.targets.target, license=plan.license)
        record = with_earlier(record, plan.output)
        record, text = _export(run, record, config)
        record, plan = _space(run, record, plan, text, hub)
        space_folder = space_folder_of(plan.output) if plan.targets.space is not None else None
        if config.space != "none" and space_folder is None and remove_space(space_folder_of(plan.output), record):
            reporter.note("Removed the Space folder of an earlier run of this push, because no Space is published.")
        for place in published_models(plan.output, space_folder):
            check_opens(place)
        return publish_both(record, plan.output, space_folder, plan.targets, config, Publisher(hub, reporter))


def _export(run: Run, record: RunRecord, config: PushConfig) -> tuple[RunRecord, _ExportText]:
    """Export the requested ONNX files; those of an earlier run in other formats are removed."""
    if not config.onnx:
        remove_onnx(run.output)
        return record, _ExportText()
    record = export_optimum(run.output, record, run.stages)
    remove_exports(run.output, [name for name in quantized() if name not in config.quantize])
    if not config.quantize:
        return record, _ExportText()
    held_out, fit = export_rows(run)
    record = export_checked(run.output, record, run.stages, config.quantize, held_out, fit=fit)
    return record, _ExportText(held_out, fit)


def _space(run: Run, record: RunRecord, plan: PushPlan, text: _ExportText, hub: Hub) -> tuple[RunRecord, PushPlan]:
    """Write record, card and the Space folder. The Space is planned again, because the sizes are known now and a format
    may have failed its check; and once more after the export of the original."""
    targets = plan.targets
    if targets.space is not None:
        targets = targets.with_space(plan_of(record))
    record = dataclasses.replace(record, space=targets.space_target if targets.space else None)
    record = write_results(record, plan.output, run.reporter)
    if targets.space is not None:
        written = write_space_folder(
            run.original, run.stages, record, targets.space, space_folder_of(plan.output), targets.target,
            text.held_out, text.fit, kind=targets.kinds.order[0], page=browser_page(plan.output, record, hub.endpoint),
        )  # fmt: skip
        targets = targets.with_space(written)
        if targets.space is None:
            record = write_results(dataclasses.replace(record, space=None), plan.output)
    return record, dataclasses.replace(plan, targets=targets)
