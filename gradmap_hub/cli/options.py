"""Options that several commands share, and what is made of them.

`prune_options` gives a command the options of PruneConfig, with its defaults and help texts: how a flag is spelled,
what it means and what it is by default stands in one place, however many commands have it.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape

from gradmap_hub.config import (
    DEFAULT_CALIBRATION,
    PRESETS,
    PruneConfig,
    PushConfig,
    help_of,
    paper_preset,
)
from gradmap_hub.errors import UsageError

C = TypeVar("C", bound=Callable[..., None])

# Fields of PruneConfig in the order of the help, by what they are about.
HOW_MUCH = ("ratio", "layers", "drop")
METHOD = ("metric", "schedule", "compensation", "preset")
TEXTS = ("calibration", "eval_text", "samples", "seq_len", "eval_rows")
COMPUTING = ("low_memory", "device", "compute")
HOW = (*METHOD, *TEXTS, "dtype", "seed", "heal", *COMPUTING)
_SHORT = {"ratio": "-r", "calibration": "-c"}
_METAVARS = {"heal": "STEPS"}
# What is typed where it is not what the field holds; all other fields are typed as they are, their choices as words.
_TYPED: dict[str, Any] = {
    "ratio": float | None,
    "layers": int | None,
    "drop": str | None,
    "calibration": list[str] | None,
    "eval_text": list[str] | None,
}
_PRESET = typer.Option("--preset", help="default, or paper: the paper's own setting, by name.")


@dataclass(frozen=True)
class PruneOptions:
    """What was typed: `values` of fields of PruneConfig, and the preset."""

    values: dict[str, Any] = field(default_factory=dict)
    preset: str = "default"

    def config(self, **further: Any) -> PruneConfig:
        """The configuration of these options and of `further` fields.

        Raises:
            UsageError: a value that cannot be.
        """
        return self.with_preset(PruneConfig(**(self.values | further)))

    def with_preset(self, config: PruneConfig) -> PruneConfig:
        return paper_preset(config) if self.preset == "paper" else config


def prune_options(*names: str) -> Callable[[C], C]:
    """Put the options `names` where a command has its parameter `options`, which gets them as `PruneOptions`."""

    def decorate(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += [_parameter(name) for name in names] if parameter.name == "options" else [parameter]

        def run(**given: Any) -> None:
            typed = {name: given.pop(name) for name in names}
            command(**given, options=_options(typed))

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        # What Typer reads a command from.
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
    if "eval_text" in values:
        values["eval_text"] = tuple(values["eval_text"] or ())
    return PruneOptions(values, preset)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--drop takes layer indices such as 12,13,14; got {text!r}.") from None


def parse_ratios(text: str) -> tuple[float, ...]:
    """0.1,0.25 -> (0.1, 0.25).

    Raises:
        UsageError: no number, or one that is not between 0 and 1.
    """
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UsageError(f"--ratios takes numbers between 0 and 1, both excluded, such as 0.1,0.25; got {text!r}.")
    return ratios


Revision = Annotated[str | None, typer.Option("--revision", help=help_of(PushConfig, "revision"))]
Resume = Annotated[bool, typer.Option("--resume", help=help_of(PushConfig, "resume"))]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=help_of(PushConfig, "model"))]


def command_line() -> str:
    """The command as it can be run again, with paths reduced to their last part: the record is published.

    What says nothing about the result is left out: going on with a run must not change what it publishes.
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
    """/home/me/a.txt -> a.txt, also behind `--option=` and glued to a short option (-c/home/me/a.txt)."""
    head, path = "", word
    if word.startswith("--"):
        head, sign, path = word.partition("=")
        head += sign
    elif word.startswith("-"):
        head, path = word[:2], word[2:]
    if os.path.isabs(path) or path.startswith(("./", "../", "~")) or "/../" in path:
        path = Path(path).name
    return head + path
