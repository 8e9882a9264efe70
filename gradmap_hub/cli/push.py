"""`gradmap-hub push`: prune, measure, export and publish in one command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from gradmap_hub.cli.options import (
    HOW,
    HOW_MUCH,
    Collection,
    CreatePr,
    DryRun,
    From,
    Json,
    License,
    LicenseLink,
    LicenseName,
    ModelOrRecord,
    NoSpace,
    Onnx,
    PruneOptions,
    Public,
    Quiet,
    Resume,
    Revision,
    To,
    Update,
    WaitSpace,
    WithSpace,
    command_line,
    given_names,
    kind_of_space,
    prune_options,
    repeat_record,
    split_names,
)
from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.cli.tables import next_view, plan_view, published_view, push_json, record_view, visibility
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.config import PushConfig, help_of
from gradmap_hub.errors import UsageError

if TYPE_CHECKING:
    from gradmap_hub.pipeline.plan import PushPlan
    from gradmap_hub.pipeline.publish import PushResult


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub push HuggingFaceTB/SmolLM2-135M-Instruct --ratio 0.25 --dry-run")(push)


@prune_options(*HOW_MUCH, *HOW)
def push(
    context: typer.Context,
    model: ModelOrRecord = None,
    from_: From = None,
    *,
    options: PruneOptions,
    to: To = None,
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=help_of(PushConfig, "output"))] = None,
    public: Public = False,
    onnx: Onnx = True,
    quantize: Annotated[str, typer.Option("--quantize", help=help_of(PushConfig, "quantize"))] = "",
    space: WithSpace = "auto",
    no_space: NoSpace = False,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    update: Update = False,
    create_pr: CreatePr = False,
    collection: Collection = None,
    wait_space: WaitSpace = 300,
    dry_run: DryRun = False,
    resume: Resume = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help=help_of(PushConfig, "trust_remote_code"))
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune, verify, measure, export, write the card and the Space, publish, and verify what was published."""
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.plan import make_plan
    from gradmap_hub.pipeline.push import push as run_push

    fields: dict[str, Any] = {
        "output": output, "to": to, "public": public, "onnx": onnx, "quantize": split_names(quantize),
        "space": kind_of_space(space, no_space),
        "license": license, "license_name": license_name, "license_link": license_link, "update": update,
        "create_pr": create_pr, "collection": collection, "wait_space": wait_space, "resume": resume,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    hub = Hub()
    with TerminalReporter(stderr, quiet=quiet) as reporter:
        if from_ is not None:
            from gradmap_hub.pipeline.reproduce import push_config_from

            again = repeat_record(context, from_, model, revision, options, hub, reporter)
            names = given_names(context) | ({"space"} if no_space else set())
            given = {name: value for name, value in fields.items() if name in names}
            config = push_config_from(again, {**given, "prune": options.with_preset(again.prune)})
        elif model is None:
            raise UsageError("Give MODEL, or --from with the record of an earlier run.")
        else:
            config = PushConfig(model=model, revision=revision, prune=options.config(), **fields)
        if dry_run:
            emit(_plan(make_plan(config, hub)), as_json)
            return
        result = run_push(config, command=command_line(), reporter=reporter, hub=hub)
    emit(Result(push_json(result), _view(result, quiet)), as_json)


def _view(result: PushResult, quiet: bool) -> Iterator[RenderableType]:
    yield from record_view(result.record)
    yield from published_view(result)
    yield from next_view(result, quiet=quiet)


def _plan(plan: PushPlan) -> Result:
    source, targets = plan.source, plan.targets
    layers = {"before": source.layer_count, "after": source.layer_count - plan.removals}
    shown_as = visibility(create_pr=targets.create_pr, public=targets.public)
    answer: dict[str, Any] = {
        "model": source.base.name,
        "commit": source.base.commit,
        "model_type": source.base.model_type,
        "layers": layers,
        "weight_bytes": source.weight_bytes,
        "disk_bytes": plan.disk_bytes,
        "license": plan.license,
        "gated": source.base.gated,
        "output": str(plan.output),
        "target": targets.target,
        "space": targets.space_target if targets.space else None,
        "space_kinds": list(targets.kinds.order),
        "space_original": targets.space.reason if targets.space else targets.space_reason or None,
        "visibility": shown_as,
        "upload_bytes": plan.upload_bytes,
        "checks": [asdict(check) for check in plan.checks],
    }
    facts = {
        "model": f"{source.base.name} at {source.base.commit}" if source.base.commit else source.base.name,
        "type": str(source.base.model_type),
        "layers": f"{layers['before']} -> {layers['after']}",
        "weights": f"{source.weight_bytes / 1e6:,.1f} MB to fetch",
        "folder": str(plan.output),
        "target": f"{targets.target} ({shown_as})",
        "space": f"{targets.space_target}: {targets.space.reason}" if targets.space else targets.space_reason or "none",
        **({"kind": targets.kinds.reason} if targets.space else {}),
    }
    return Result(answer, plan_view(facts, plan.checks, "Nothing was fetched, written or published."))
