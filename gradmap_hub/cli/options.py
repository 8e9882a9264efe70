"""Options that several commands share, and the parsing of their values.

`prune_options` gives a command the options of PruneConfig with their defaults and help texts, so each flag is defined
once for all commands.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
    PRESETS,
    Method,
    PruneConfig,
    PruneMethod,
    PushConfig,
    help_of,
    paper_preset,
)
from gradmap_hub.errors import UsageError

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.pipeline.reproduce import Repeat
    from gradmap_hub.progress import Reporter

C = TypeVar("C", bound=Callable[..., None])

# Fields of PruneConfig by subject, in the order of the help.
HOW_MUCH = ("ratio", "layers", "drop")
METHOD = ("metric", "schedule", "compensation", "preset")
TEXTS = ("calibration", "eval_text", "samples", "seq_len", "eval_rows")
COMPUTING = ("low_memory", "device", "compute")
HEALING = ("heal", "heal_text", "heal_part")
HOW = (*METHOD, *TEXTS, "dtype", "seed", *HEALING, *COMPUTING)
_SHORT = {"ratio": "-r", "calibration": "-c"}
_METAVARS = {"heal": "BUDGET"}
# Types of the options that differ from the type of the field; choices are typed as str.
_TYPED: dict[str, Any] = {
    "ratio": float | None,
    "layers": int | None,
    "drop": str | None,
    "calibration": list[str] | None,
    "eval_text": list[str] | None,
    "heal_text": list[str] | None,
}
_PRESET = typer.Option("--preset", help="default, or paper: the settings of the GradMAP paper.")


@dataclass(frozen=True)
class PruneOptions:
    """The options as given on the command line: `values` by field of PruneConfig, and the preset."""

    values: dict[str, Any] = field(default_factory=dict)
    preset: str = "default"

    def config(self, **further: Any) -> PruneConfig:
        """The configuration of these options and of `further` fields.

        Raises:
            UsageError: an invalid value.
        """
        return self.with_preset(PruneConfig(**(self.values | further)))

    def method(self) -> PruneMethod:
        """The configuration for a command without --ratio, --layers and --drop.

        Raises:
            UsageError: an invalid value.
        """
        return self.with_preset(PruneMethod(**self.values))

    def with_preset(self, config: Method) -> Method:
        return paper_preset(config) if self.preset == "paper" else config


def prune_options(*names: str) -> Callable[[C], C]:
    """Replace the parameter `options` of a command by the options `names`; the command gets them as `PruneOptions`."""

    def decorate(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += [_parameter(name) for name in names] if parameter.name == "options" else [parameter]

        def run(**given: Any) -> None:
            typed = {name: given.pop(name) for name in names}
            command(**given, options=_options(typed))

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        # Typer reads the options of a command from these two.
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
        return run  # pyright: ignore[reportReturnType]

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """The parameter of one option, for a signature."""
    if name == "preset":
        kind, default, option = str, "default", _PRESET
    else:
        [entry] = [entry for entry in dataclasses.fields(PruneConfig) if entry.name == name]
        default = None if name in _TYPED else entry.default
        kind = _TYPED.get(name, type(default))
        flags = ["--" + name.replace("_", "-"), *([_SHORT[name]] if name in _SHORT else [])]
        text = escape(help_of(PruneConfig, name))
        option = typer.Option(*flags, metavar=_METAVARS.get(name), help=text, show_default=True)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _options(typed: dict[str, Any]) -> PruneOptions:
    values = dict(typed)
    preset = values.pop("preset", "default")
    if preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    if values.get("drop") is not None:
        values["drop"] = _indices(values["drop"])
    if "calibration" in values:
        values["calibration"] = tuple(values["calibration"] or (DEFAULT_CALIBRATION,))
    for name in ("eval_text", "heal_text"):
        if name in values:
            values[name] = tuple(values[name] or ())
    return PruneOptions(values, preset)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--drop takes layer indices such as 12,13,14; got {text!r}.") from None


# -- options, in the order in which commands have them ----------------------------------------------------------------

Model = Annotated[str, typer.Argument(metavar="MODEL", help=help_of(PushConfig, "model"))]
ModelOrRecord = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=help_of(PushConfig, "model") + " Not needed with --from.")
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder made by prune or push.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RECORD",
        help="Repeat an earlier run: its gradmap.json, a folder that holds one, or a model on the Hub. Same original "
        "at the same commit, same settings, same texts (searched next to the record, in this folder, and in -c). "
        "Options on the command line override the record's.",
    ),
]
To = Annotated[str | None, typer.Option("--to", help=help_of(PushConfig, "to"))]
Revision = Annotated[str | None, typer.Option("--revision", help=help_of(PushConfig, "revision"))]
Public = Annotated[bool, typer.Option("--public", help=help_of(PushConfig, "public"))]
Onnx = Annotated[bool, typer.Option("--onnx/--no-onnx", help=help_of(PushConfig, "onnx"))]
WithSpace = Annotated[str, typer.Option("--space", metavar="KIND", help=help_of(PushConfig, "space"))]
NoSpace = Annotated[bool, typer.Option("--no-space", help="The same as --space none.")]
License = Annotated[str | None, typer.Option("--license", help=help_of(PushConfig, "license"))]
LicenseName = Annotated[str | None, typer.Option("--license-name", help=help_of(PushConfig, "license_name"))]
LicenseLink = Annotated[str | None, typer.Option("--license-link", help=help_of(PushConfig, "license_link"))]
Update = Annotated[bool, typer.Option("--update", help=help_of(PushConfig, "update"))]
CreatePr = Annotated[bool, typer.Option("--create-pr", help=help_of(PushConfig, "create_pr"))]
Collection = Annotated[
    str | None, typer.Option("--collection", metavar="NAME", help=escape(help_of(PushConfig, "collection")))
]
WaitSpace = Annotated[
    int, typer.Option("--wait-space", metavar="SECONDS", help=help_of(PushConfig, "wait_space"), min=0)
]
Host = Annotated[str, typer.Option("--host", help="Address to bind to.")]
Port = Annotated[int, typer.Option("--port", help="Port; 0 takes any free one.", min=0, max=65535)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; nothing is changed.")]
Resume = Annotated[bool, typer.Option("--resume", help=help_of(PushConfig, "resume"))]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


# -- what is read from the command line -------------------------------------------------------------------------------


def given_names(context: typer.Context) -> set[str]:
    """The names of the command's parameters that are given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def repeat_record(
    context: typer.Context,
    record: str,
    model: str | None,
    revision: str | None,
    options: PruneOptions,
    hub: Hub,
    reporter: Reporter,
) -> Repeat:
    """The run that `--from RECORD` repeats, with the options on the command line; its remarks are noted to `reporter`.

    Raises:
        GradmapError: see `pipeline.reproduce.repeat`.
    """
    from gradmap_hub.pipeline.reproduce import repeat

    names = given_names(context)
    given = {name: value for name, value in options.values.items() if name in names}
    again = repeat(record, model=model, revision=revision, given=given, hub=hub)
    for remark in again.remarks:
        reporter.note(remark)
    return again


def kind_of_space(space: str, without: bool) -> str:
    """The kind of Space that --space and --no-space select; `without`: whether --no-space is given."""
    return "none" if without else space


def with_kind(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `auto` for a --space without a kind, which was a flag in earlier versions."""
    found: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        bare = argument == "--space" and arguments[0] in ("push", "publish") and following.startswith("-")
        found.append("--space=auto" if bare else argument)
    return found


def split_names(text: str) -> tuple[str, ...]:
    """int8, int4,int8 -> ("int8", "int4")."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse_ratios(text: str) -> tuple[float, ...]:
    """0.1,0.25 -> (0.1, 0.25).

    Raises:
        UsageError: not a list of numbers, or one is outside (0, 1).
    """
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UsageError(f"--ratios takes numbers between 0 and 1, both excluded, such as 0.1,0.25; got {text!r}.")
    return ratios


def command_line() -> str:
    """The command line for the record. The record is published, so paths are reduced to their last part.

    Options without influence on the result are left out, so that a run with --resume writes the same record.
    """
    words: list[str] = []
    before = ""
    for word in sys.argv[1:]:
        unwanted = word in _NOT_RECORDED or word.partition("=")[0] in _NOT_RECORDED_WITH_VALUE
        if not unwanted and before not in _NOT_RECORDED_WITH_VALUE:
            words.append(word)
        before = word
    return shlex.join(["gradmap-hub", *map(_without_folders, words)])


_NOT_RECORDED = {"--resume", "--public", "--update", "--json", "--quiet", "-q", "--debug"}
_NOT_RECORDED_WITH_VALUE: Sequence[str] = ("--collection", "--wait-space")


def _without_folders(word: str) -> str:
    """/home/me/a.txt -> a.txt, also after `--option=` and after a short option (-c/home/me/a.txt)."""
    head, path = "", word
    if word.startswith("--"):
        head, sign, path = word.partition("=")
        head += sign
    elif word.startswith("-"):
        head, path = word[:2], word[2:]
    if os.path.isabs(path) or path.startswith(("./", "../", "~")) or "/../" in path:
        path = Path(path).name
    return head + path
