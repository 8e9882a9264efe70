"""The command line. Thin: it parses, calls the pipeline and prints; results on stdout, progress on stderr."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradmap_hub import __version__
from gradmap_hub.cli import evaluate as cli_evaluate
from gradmap_hub.cli import generate as cli_generate
from gradmap_hub.cli import serve as cli_serve
from gradmap_hub.cli import sweep as cli_sweep
from gradmap_hub.cli.options import (
    COMPUTING,
    HOW,
    HOW_MUCH,
    Json,
    Model,
    PruneOptions,
    Quiet,
    Resume,
    Revision,
    command_line,
    parse_ratios,
    prune_options,
)
from gradmap_hub.cli.terminal import TerminalReporter, inspect_table
from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
    PruneConfig,
    PublishConfig,
    PushConfig,
    help_of,
)
from gradmap_hub.errors import GradmapError, UsageError
from gradmap_hub.formats import quantized
from gradmap_hub.record import RunRecord

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.checks import Check
    from gradmap_hub.pipeline.demo import DemoResult
    from gradmap_hub.pipeline.plan import PublishPlan, PushPlan
    from gradmap_hub.pipeline.publish import PushResult
    from gradmap_hub.pipeline.reproduce import Repeat

app = typer.Typer(
    name="gradmap-hub",
    help="Prune a causal language model by depth, verify and measure it, and publish it with the numbers to show.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # plain tracebacks; older versions of Typer print local variables, tokens too
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `gradmap-hub demo`: the whole push on this machine, without an account.",
)
stdout = Console(soft_wrap=True)
stderr = Console(stderr=True, soft_wrap=True)
# Typer's own base class of usage errors; it moved from click into typer, so it is found by inheritance.
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])


def main() -> NoReturn:
    """Entry point: run a command and turn every expected failure into one line and an exit status."""
    # SIGTERM cleans up as Ctrl-C does: child processes end, half-written files go.
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell without job control starts background commands with SIGINT ignored; servers and long runs must stop on it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Importing torch and transformers makes a million objects, none of them garbage: looking for it takes a second.
    gc.set_threshold(100_000, 30, 30)
    debug = "--debug" in sys.argv or bool(os.environ.get("GRADMAP_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
        status = code if isinstance(code, int) else 0
        if status == 130:  # Typer turns Ctrl-C into this, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()
    except GradmapError as error:
        _trace(debug)
        status = _report(error.message, error.hint, 2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        hint = _GOES_ON.get(arguments[0]) if arguments else None
        status = _report("Interrupted.", hint, 130)
    except _ClickException as error:
        _trace(debug)
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        # Without any argument the help has been shown, and there is nothing to add.
        status = _report(message, None, 2) if message else 2
    except BrokenPipeError:
        # Whoever read our answer has enough; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except MemoryError:
        status = _report("Not enough memory for this model.", "Use a machine with more, or a smaller model.", 1)
    except OSError as error:  # a full disk, a folder that may not be written
        _trace(debug)
        reason = str(error.strerror or error).strip() or type(error).__name__
        status = _report(reason.splitlines()[0] + (f": {error.filename}" if error.filename else ""), None, 1)
    sys.exit(status)


_WITH_RESUME = "Run the same command again with --resume to go on where it stopped."
# After Ctrl-C, by command.
_GOES_ON = {
    "push": _WITH_RESUME,
    "prune": _WITH_RESUME,
    "demo": _WITH_RESUME,
    "evaluate": "Run the same command again to go on where it stopped; record and card are as they were.",
    "sweep": "Run the same command again to go on where it stopped.",
}


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _report(message: str, hint: str | None, status: int) -> int:
    stderr.print(f"[red]error[/] {escape(message)}", highlight=False)
    if hint:
        stderr.print(f"      {escape(hint)}", highlight=False)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del version, debug  # --version acts when it is parsed, --debug before anything is (see `main`)


# Options that several commands share; those about pruning, and others, are in cli_options.
ModelOrRecord = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=help_of(PushConfig, "model") + " Not needed with --from.")
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RECORD",
        help="Make an earlier run again: its gradmap.json, a folder that holds one, or a model on the Hub. Same "
        "original at the same commit, same settings, same texts (looked for beside the record, here, and with -c). "
        "Options given besides go before the record's.",
    ),
]
License = Annotated[str | None, typer.Option("--license", help=help_of(PushConfig, "license"))]
LicenseName = Annotated[str | None, typer.Option("--license-name", help=help_of(PushConfig, "license_name"))]
LicenseLink = Annotated[str | None, typer.Option("--license-link", help=help_of(PushConfig, "license_link"))]
Update = Annotated[bool, typer.Option("--update", help=help_of(PushConfig, "update"))]
CreatePr = Annotated[bool, typer.Option("--create-pr", help=help_of(PushConfig, "create_pr"))]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", metavar="NAME", help=escape(help_of(PushConfig, "collection")))
]
WaitSpace = Annotated[
    int, typer.Option("--wait-space", metavar="SECONDS", help=help_of(PushConfig, "wait_space"), min=0)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; nothing is changed.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder made by prune or push.")]
Against = Annotated[str | None, typer.Option("--against", help="The original; default: as recorded.")]
SpaceText = Annotated[
    str,
    typer.Option(
        "--text",
        help="What the perplexity of the original's int8 and int4 is measured on, if FOLDER has such files: a file, or "
        "a data set.",
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address to bind to.")]
Port = Annotated[int, typer.Option("--port", help="Port; 0 takes any free one.", min=0, max=65535)]


def _given(context: typer.Context) -> set[str]:
    """The names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _repeat(
    context: typer.Context, record: str, model: str | None, revision: str | None, options: PruneOptions, hub: Hub
) -> Repeat:
    from gradmap_hub.pipeline.reproduce import repeat

    given = {name: value for name, value in options.values.items() if name in _given(context)}
    return repeat(record, model=model, revision=revision, given=given, hub=hub)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@app.command(
    epilog="Example: gradmap-hub push HuggingFaceTB/SmolLM2-135M-Instruct --ratio 0.25 --dry-run",
)
@prune_options(*HOW_MUCH, *HOW)
def push(
    context: typer.Context,
    model: ModelOrRecord = None,
    from_: From = None,
    *,
    options: PruneOptions,
    to: Annotated[str | None, typer.Option("--to", help=help_of(PushConfig, "to"))] = None,
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=help_of(PushConfig, "output"))] = None,
    public: Annotated[bool, typer.Option("--public", help=help_of(PushConfig, "public"))] = False,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help=help_of(PushConfig, "onnx"))] = True,
    quantize: Annotated[str, typer.Option("--quantize", help=help_of(PushConfig, "quantize"))] = "",
    space: Annotated[bool, typer.Option("--space/--no-space", help=help_of(PushConfig, "space"))] = True,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    update: Update = False,
    create_pr: CreatePr = False,
    collection: CollectionOption = None,
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

    reporter = TerminalReporter(stderr, quiet=quiet)
    hub = Hub()
    repeats = None
    if from_ is not None:
        again = _repeat(context, from_, model, revision, options, hub)
        model, revision, prune_config, repeats = again.model, again.revision, again.prune, again.expected
        given, record = _given(context), again.record
        if record.target is not None:  # published, so that it says what was
            made = {entry.format for entry in record.artifacts}
            onnx = onnx if "onnx" in given else "onnx" in made
            quantize = quantize if "quantize" in given else ",".join(name for name in quantized() if name in made)
            space = space if "space" in given else record.space is not None
        if license is None and record.base.license_source == "publisher":
            license = record.base.license
        license_name = license_name or record.base.license_name
        license_link = license_link or record.base.license_link
        for remark in again.remarks:
            reporter.note(remark)
    elif model is None:
        raise UsageError("Say what to push: MODEL, or --from with the record of an earlier run.")
    else:
        prune_config = PruneConfig(**options.values)
    config = PushConfig(
        model=model,
        prune=options.with_preset(prune_config),
        revision=revision,
        output=output,
        to=to,
        public=public,
        onnx=onnx,
        quantize=_words(quantize),
        space=space,
        license=license,
        license_name=license_name,
        license_link=license_link,
        update=update,
        create_pr=create_pr,
        collection=collection,
        wait_space=wait_space,
        resume=resume,
        trust_remote_code=trust_remote_code,
        repeats=repeats,
    )
    if dry_run:
        _print_plan(make_plan(config, hub), as_json)
        return
    try:
        result = run_push(config, command=command_line(), reporter=reporter, hub=hub)
    finally:
        reporter.close()
    if as_json:
        _print_json(push_json(result))
    else:
        _print_record(result.record)
        _print_published(result)


@app.command(epilog="Example: gradmap-hub prune HuggingFaceTB/SmolLM2-135M-Instruct small --layers 8")
@prune_options(*HOW_MUCH, *HOW)
def prune(
    context: typer.Context,
    model: ModelOrRecord = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="Folder for the result; new or empty.")
    ] = None,
    from_: From = None,
    *,
    options: PruneOptions,
    revision: Revision = None,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL into the folder OUTPUT: checkpoint, tokenizer, card and gradmap.json. Publishes nothing."""
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.prune import prune as run_prune

    if from_ is not None and output is None and model is not None:  # with a record, one word is where it goes
        model, output = None, Path(model)
    if output is None or (model is None and from_ is None):
        raise UsageError("prune takes MODEL and OUTPUT, or --from RECORD and OUTPUT.")
    reporter = TerminalReporter(stderr, quiet=quiet)
    hub = Hub()
    repeats = None
    if from_ is not None:
        again = _repeat(context, from_, model, revision, options, hub)
        model, revision, config, repeats = again.model, again.revision, again.prune, again.expected
        for remark in again.remarks:
            reporter.note(remark)
    else:
        config = PruneConfig(**options.values)
    try:
        record = run_prune(
            model or "",
            output,
            options.with_preset(config),
            revision=revision,
            resume=resume,
            command=command_line(),
            reporter=reporter,
            hub=hub,
            repeats=repeats,
        )
    finally:
        reporter.close()
    if as_json:
        _print_json(record_json(record, output))
    else:
        _print_record(record)
        stdout.print(f"\nWritten to {escape(str(output))}. Publish it with: gradmap-hub publish {escape(str(output))}")


@app.command(epilog="Example: gradmap-hub inspect HuggingFaceTB/SmolLM2-135M-Instruct -c text.txt")
@prune_options("calibration", "samples", "seq_len", "seed", *COMPUTING)
def inspect(
    model: Model,
    *,
    options: PruneOptions,
    revision: Revision = None,
    ratios: Annotated[str, typer.Option("--ratios", help="Ratios to show the choice for.")] = "0.1,0.25",
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the scores into this PNG or SVG.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the layers of MODEL and show what would go at each ratio; nothing is removed."""
    if plot is not None and (plot.suffix not in (".png", ".svg") or not plot.parent.is_dir()):
        raise UsageError(f"--plot takes a .png or .svg file in a folder that exists; got {plot}.")
    config, wanted = options.config(layers=1), parse_ratios(ratios)
    from gradmap_hub.pipeline.inspect import inspect as run_inspect

    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        found = run_inspect(model, config, ratios=wanted, revision=revision, reporter=reporter)
    finally:
        reporter.close()
    choices = {f"{ratio:.0%}": candidate.removed for ratio, candidate in found.choices.items()}
    if plot is not None:
        from gradmap_hub.pruning.plots import inspect_plot

        inspect_plot(found.scores, found.scores.shift, choices, plot)
    if as_json:
        goes = [{"ratio": ratio, **asdict(candidate)} for ratio, candidate in found.choices.items()]
        _print_json({**asdict(found.scores), "influence": found.scores.influence, "choices": goes})
        return
    stdout.print(inspect_table(model, found.scores, choices))
    for ratio, candidate in found.choices.items():
        stdout.print(
            f"{ratio:.0%}: {len(candidate.removed)} layers by {candidate.name}, held-out loss {candidate.loss:.3f} "
            f"(all layers {found.scores.loss:.3f} on the scoring rows)",
            highlight=False,
        )
    stdout.print("Before swaps and correction; `prune` and `push` go on from there.", highlight=False)


@app.command(epilog="Example: gradmap-hub publish small --to me/small-gradmap")
def publish(
    folder: Folder,
    to: Annotated[str | None, typer.Option("--to", help=help_of(PushConfig, "to"))] = None,
    space: Annotated[bool, typer.Option("--space/--no-space", help="Also publish the Space folder beside it.")] = True,
    public: Annotated[bool, typer.Option("--public", help=help_of(PushConfig, "public"))] = False,
    update: Update = False,
    create_pr: CreatePr = False,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    collection: CollectionOption = None,
    wait_space: WaitSpace = 300,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload what is already built and verify it. Nothing is computed again; running it twice does nothing new."""
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.plan import plan_publish
    from gradmap_hub.pipeline.publish import publish_folder

    config = PublishConfig(
        to=to, space=space, public=public, update=update, create_pr=create_pr, license=license,
        license_name=license_name, license_link=license_link, collection=collection, wait_space=wait_space,
    )  # fmt: skip
    if dry_run:
        _print_publish_plan(plan_publish(folder, config, Hub()), as_json)
        return
    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        result = publish_folder(folder, config, hub=Hub(), reporter=reporter)
    finally:
        reporter.close()
    if as_json:
        _print_json(push_json(result))
    else:
        _print_published(result)


@app.command(epilog="Example: gradmap-hub export small --to onnx,int8 --text notes.txt")
def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to", help=f"Formats, comma-separated: onnx (float32, Optimum's graph), {', '.join(quantized())}."
        ),
    ] = "onnx",
    text: Annotated[
        str,
        typer.Option(
            "--text", help="What the perplexity of int8, int4 and genai is measured on: a file, or a data set."
        ),
    ] = DEFAULT_CALIBRATION,
    keep_failing: Annotated[
        bool, typer.Option("--keep-failing", help="Keep a quantised file that costs more perplexity than it may.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a pruned folder to ONNX with KV cache, and compare every file with PyTorch."""
    from gradmap_hub.pipeline.export import export_folder

    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        record = export_folder(folder, _words(to), text=text, keep_failing=keep_failing, reporter=reporter)
    finally:
        reporter.close()
    exported = [asdict(artifact) for artifact in record.artifacts if artifact.format != "safetensors"]
    if as_json:
        _print_json({"folder": str(folder), "artifacts": exported})
    else:
        for artifact in exported:
            quality = artifact["quality"]
            ratio = quality["perplexity"] / quality["checkpoint_perplexity"] if quality else None
            cost = f"  perplexity {100 * (ratio - 1):+z.1f} %" if ratio else ""
            stdout.print(f"{artifact['path']}  {artifact['bytes']:,} bytes{cost}  sha256 {artifact['sha256']}")


@app.command(epilog="Example: gradmap-hub space small --against HuggingFaceTB/SmolLM2-135M-Instruct")
def space(
    folder: Folder,
    against: Against = None,
    text: SpaceText = DEFAULT_CALIBRATION,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the comparison Space for FOLDER beside it (FOLDER-space)."""
    from gradmap_hub.pipeline.space import build_space

    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        built = build_space(folder, against, text=text, reporter=reporter)
    finally:
        reporter.close()
    if as_json:
        _print_json({"folder": str(folder), "space_folder": str(built)})
    else:
        stdout.print(f"Written to {escape(str(built))}. Run it with: gradmap-hub compare {escape(str(folder))}")


@app.command(epilog="Example: gradmap-hub compare small")
def compare(
    folder: Folder,
    against: Against = None,
    text: SpaceText = DEFAULT_CALIBRATION,
    host: Host = "127.0.0.1",
    port: Port = 0,
    open_browser: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open",
            help="Open the page in a browser. Default: yes, in a terminal with a screen.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the comparison app for FOLDER on this machine: the same files as the published Space."""
    from gradmap_hub.pipeline.space import build_space
    from gradmap_hub.space.local import at_a_screen, run_space

    if open_browser is None:
        open_browser = at_a_screen()
    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        built = build_space(folder, against, local=True, text=text, reporter=reporter)
    finally:
        reporter.close()
    run_space(built, {"PRUNED_MODEL": str(folder.resolve())}, host=host, port=port, open_browser=open_browser)


cli_evaluate.register(app)
cli_generate.register(app)
cli_serve.register(app)
cli_sweep.register(app)


@app.command(epilog="Example: gradmap-hub hub --root ./my-hub --port 8900")
def hub(
    root: Annotated[Path, typer.Option("--root", help="Folder that holds the repositories.")] = Path(
        "gradmap-hub-data"
    ),
    host: Host = "127.0.0.1",
    port: Port = 0,
    cdn_port: Annotated[
        int,
        typer.Option(
            "--cdn-port", help="Port of large downloads, without tokens; 0 takes any free one.", min=0, max=65535
        ),
    ] = 0,
    user: Annotated[
        str, typer.Option("--user", help="User to create if there is none; its token is printed.")
    ] = "local",
) -> None:
    """Run the embedded Hub alone, for rehearsal and air-gapped use. It stops on Ctrl-C."""
    from gradmap_hub.local_hub import LocalHub

    try:
        server = LocalHub(root, host=host, port=port, cdn_port=cdn_port)
        token = server.add_user(user)
        server.start()
    except (OSError, RuntimeError, ValueError) as error:
        raise GradmapError(f"The Hub cannot be started: {error}") from error
    print(server.url, flush=True)
    settings = f"HF_ENDPOINT={server.url} HF_TOKEN={token} HF_HUB_DISABLE_XET=1"
    stderr.print(f"Use it with: export {settings}", highlight=False)
    server.serve_forever()


@app.command(epilog="Example: gradmap-hub demo --output try --open")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything; new or empty.")] = Path(
        "gradmap-demo"
    ),
    ratio: Annotated[float, typer.Option("--ratio", "-r", help=help_of(PruneConfig, "ratio"))] = 0.25,
    space: Annotated[bool, typer.Option("--space/--no-space", help=help_of(PushConfig, "space"))] = True,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help=help_of(PushConfig, "onnx"))] = True,
    open_browser: Annotated[bool, typer.Option("--open", help="Run the published Space and open it.")] = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole push on this machine, no account needed: a real 135M model, a real Hub client, an embedded Hub."""
    from gradmap_hub.pipeline.demo import run_demo

    PruneConfig(ratio=ratio)  # refuse a bad ratio before anything is downloaded
    reporter = TerminalReporter(stderr, quiet=quiet)
    try:
        result = run_demo(
            output, ratio=ratio, onnx=onnx, space=space, resume=resume, quiet=quiet, reporter=reporter,
            open_browser=open_browser and not as_json,
            finished=lambda done: _print_json(done.json()) if as_json else _print_demo(done),
        )  # fmt: skip
    finally:
        reporter.close()
    del result


# -- printing ------------------------------------------------------------------------------------------------------


def record_json(record: RunRecord, folder: Path) -> dict[str, Any]:
    """The part of the JSON answer that prune, push and demo share."""
    evaluation = record.evaluation
    return {
        "folder": str(folder),
        "removed": record.removed,
        "layers": {"before": record.layers_before, "after": record.layers_after},
        "parameters": asdict(record.parameters),
        "bytes": asdict(record.bytes),
        "perplexity": {
            "original": evaluation.before,
            "pruned": evaluation.uncompensated,
            "compensated": evaluation.after,
        }
        if evaluation
        else None,
        "texts": [asdict(text) for text in evaluation.texts] if evaluation else [],
    }


def push_json(result: PushResult) -> dict[str, Any]:
    """The JSON answer of push and publish."""
    space: dict[str, Any] = {"reason": result.space_reason}
    if result.space is not None:
        space = {"repo_id": result.space.repo_id, "commit": result.space.commit, "url": result.space.url}
        if result.space_state is not None:
            space |= {"stage": result.space_state.stage, "state": result.space_state.words}
    further: dict[str, Any] = {}
    if result.model.pull_request:
        further["pull_request"] = result.model.pull_request
    if result.collection is not None:
        further["collection"] = asdict(result.collection)
    elif result.collection_reason:
        further["collection"] = {"reason": result.collection_reason}
    return {
        "model": {"repo_id": result.model.repo_id, "commit": result.model.commit, "url": result.model.url},
        **further,
        "space": space,
        "space_folder": str(result.space_folder) if result.space_folder else None,
        **record_json(result.record, result.folder),
    }


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def _print_plan(plan: PushPlan, as_json: bool) -> None:
    source = plan.source
    facts: dict[str, Any] = {
        "model": source.base.name,
        "commit": source.base.commit,
        "model_type": source.base.model_type,
        "layers": {"before": source.layer_count, "after": source.layer_count - plan.removals},
        "weight_bytes": source.weight_bytes,
        "disk_bytes": plan.disk_bytes,
        "license": plan.license,
        "gated": source.base.gated,
        "output": str(plan.output),
        "target": plan.target,
        "space": plan.space_target if plan.space else None,
        "space_original": plan.space.reason if plan.space else plan.space_reason or None,
        "visibility": "as it is" if plan.create_pr else "public" if plan.public else "private",
        "upload_bytes": plan.upload_bytes,
        "checks": [asdict(check) for check in plan.checks],
    }
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    layers = facts["layers"]
    for name, value in (
        ("model", f"{source.base.name} at {source.base.commit}" if source.base.commit else source.base.name),
        ("type", source.base.model_type),
        ("layers", f"{layers['before']} -> {layers['after']}"),
        ("weights", f"{source.weight_bytes / 1e6:,.1f} MB to fetch"),
        ("folder", str(plan.output)),
        ("target", f"{plan.target} ({facts['visibility']})"),
        ("space", f"{plan.space_target}: {plan.space.reason}" if plan.space else plan.space_reason or "none"),
    ):
        table.add_row(f"[dim]{name}[/]", escape(str(value)))
    stdout.print(table)
    _print_checks(plan.checks)
    stdout.print("\nNothing was fetched, written or published.")


def _print_publish_plan(plan: PublishPlan, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "folder": str(plan.folder),
        "model": plan.record.base.name,
        "license": plan.record.base.license,
        "gated": plan.record.base.gated,
        "target": plan.target,
        "space": plan.space_target if plan.space_folder else None,
        "visibility": "as it is" if plan.create_pr else "public" if plan.public else "private",
        "rewrites_card": plan.rewrites,
        "upload_bytes": plan.upload_bytes,
        "checks": [asdict(check) for check in plan.checks],
    }
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("folder", f"{plan.folder}, made from {plan.record.base.name}"),
        ("target", f"{plan.target} ({facts['visibility']})"),
        ("space", facts["space"] or "none"),
        ("card", "is written anew, for this target" if plan.rewrites else "as it is"),
    ):
        table.add_row(f"[dim]{name}[/]", escape(str(value)))
    stdout.print(table)
    _print_checks(plan.checks)
    stdout.print("\nNothing was written or published.")


def _print_checks(found: Sequence[Check]) -> None:
    checks = Table(show_header=False, box=None, pad_edge=False, title="\nChecked", title_justify="left")
    for check in found:
        checks.add_row("[green]ok[/]", f"[dim]{check.name}[/]", escape(check.result))
    stdout.print(checks)


def _print_record(record: RunRecord) -> None:
    healed = record.heal is not None and record.heal.applied
    corrected = record.compensation.applied or not healed  # the column is there even if nothing was done
    result = "pruned" + " + corrected" * corrected + " + healed" * healed
    table = Table("", "original", "pruned", result, title_justify="left", title=record.base.name)
    table.add_row("layers", str(record.layers_before), str(record.layers_after), str(record.layers_after))
    share = 1 - record.parameters.after / record.parameters.before
    after = f"{record.parameters.after / 1e6:.1f}M (-{share:.1%})"
    table.add_row("parameters", f"{record.parameters.before / 1e6:.1f}M", after, after)
    size = f"{record.bytes.after / 1e6:.1f} MB"
    table.add_row("weights", f"{record.bytes.before / 1e6:.1f} MB", size, size)
    for text in record.evaluation.texts if record.evaluation else []:
        kind = "held-out rows" if text.kind.startswith("calibration") else text.kind
        label = f"perplexity, {text.name}\n  {kind}, {text.tokens:,} tokens"
        values = [f"{value:.2f}" for value in (text.original, text.pruned, text.compensated)]
        table.add_row(escape(label), *values)
    stdout.print(table)
    correction = record.compensation
    removed = ", ".join(map(str, record.removed))
    stdout.print(f"Removed layers {removed} ({record.metric}).", highlight=False)
    if correction.applied:
        places = [f"{entry.layer} ({entry.part})" for entry in correction.corrections]
        fits = f"a {correction.kind} fit" if len(places) == 1 else f"{correction.kind} fits"
        layers = f"layer{'s' if len(places) > 1 else ''} {', '.join(places)}"
        stdout.print(f"Corrected by {fits}, folded into {layers}.", highlight=False)
    else:
        stdout.print(f"No correction applied: {correction.reason}.", highlight=False)
    if record.heal is not None and record.heal.applied:
        layers, steps = ", ".join(map(str, record.heal.layers)), record.heal.steps
        change = f"{record.heal.loss_before:.3f} -> {record.heal.loss_after:.3f}"
        stdout.print(f"Healed layers {layers} in {steps} steps: held-out loss {change}.", highlight=False)
    elif record.heal is not None:
        stdout.print(f"Healing not applied: {record.heal.reason}.", highlight=False)


def _print_published(result: PushResult) -> None:
    stdout.print(f"\nmodel  {result.model.url}  commit {result.model.commit}", highlight=False)
    if result.model.pull_request is not None:
        stdout.print(f"pull request  {result.model.pull_request}", highlight=False)
    if result.space is not None:
        stdout.print(f"space  {result.space.url}  commit {result.space.commit}", highlight=False)
        if result.space_state is not None:
            stdout.print(f"       {escape(result.space_state.words)}", highlight=False)
    else:
        stdout.print(f"space  none: {escape(result.space_reason)}", highlight=False)
    if result.collection is not None:
        stdout.print(f"collection  {escape(result.collection.url)}", highlight=False)
    elif result.collection_reason:
        stdout.print(f"collection  not done: {escape(result.collection_reason)}", highlight=False)
    stdout.print(f"folder {escape(str(result.folder))}", highlight=False)


def _shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _print_demo(result: DemoResult) -> None:
    _print_record(result.record)
    pushed = result.pushed
    stdout.print(f"\nmodel  {pushed['model']['url']}  commit {pushed['model']['commit']}", highlight=False)
    if "url" in pushed["space"]:
        stdout.print(f"space  {pushed['space']['url']}  commit {pushed['space']['commit']}", highlight=False)
    else:
        stdout.print(f"space  none: {escape(pushed['space']['reason'])}", highlight=False)
    if result.answers:
        stdout.print(f"\nThe published Space answered {escape(json.dumps(result.answers['prompt']))}:")
        for name in ("original", "pruned"):
            answer = " ".join(result.answers[name]["text"].split())
            stdout.print(f"  [bold]{name:9}[/] {escape(answer)}", highlight=False)
    stdout.print(
        f"\nfolder   {escape(_shown(result.folder))}\nhub data {escape(_shown(result.hub_root))}\n"
        f"Browse both repositories again with: gradmap-hub hub --root {escape(_shown(result.hub_root))}\n",
        highlight=False,
    )
    for difference in result.differences:
        stdout.print(f"[dim]- {escape(difference)}[/]", highlight=False)
