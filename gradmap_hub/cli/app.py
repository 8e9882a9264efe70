"""Registers the commands, and turns every expected failure into one line on stderr and an exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn, cast

import typer
from rich.markup import escape

from gradmap_hub import __version__
from gradmap_hub.cli import (
    demo,
    doctor,
    evaluate,
    export,
    generate,
    heal,
    hub,
    inspect,
    listing,
    prune,
    publish,
    push,
    serve,
    space,
    sweep,
)
from gradmap_hub.cli.options import with_kind
from gradmap_hub.cli.output import escape_logs, escape_unknown_characters, stderr
from gradmap_hub.errors import GradmapError, UsageError
from gradmap_hub.units import printable, reason_of

app = typer.Typer(
    name="gradmap-hub",
    help="Prune a causal language model by depth, verify and measure the result, and publish it with its measurements.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # plain tracebacks; older versions of Typer print local variables, tokens too
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `gradmap-hub demo`: the whole push on this machine, without an account.",
)
# Typer's own base class of usage errors; it moved from click into typer, so it is found by inheritance.
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])


def main() -> NoReturn:
    """Entry point: run a command and turn every expected failure into one line and an exit status."""
    # SIGTERM cleans up as Ctrl-C does: child processes end, half-written files are removed.
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell without job control starts background commands with SIGINT ignored; servers and long runs must stop on it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Importing torch and transformers makes a million objects, none of them garbage; collecting them takes a second.
    gc.set_threshold(100_000, 30, 30)
    escape_unknown_characters()
    escape_logs()
    debug = "--debug" in sys.argv or bool(os.environ.get("GRADMAP_DEBUG"))
    arguments = with_kind([argument for argument in sys.argv[1:] if argument != "--debug"])
    try:
        code = app(args=arguments, standalone_mode=False)
        status = code if isinstance(code, int) else 0
        if status == 130:  # Typer turns Ctrl-C into this and prints nothing
            raise KeyboardInterrupt
        sys.stdout.flush()
    except GradmapError as error:
        _trace(debug)
        status = _report(error.message, error.hint, 2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        hint = _AFTER_INTERRUPT.get(arguments[0]) if arguments else None
        status = _report("Interrupted.", hint, 130)
    except _ClickException as error:
        _trace(debug)
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        # Without arguments Typer has printed the help and the message is empty.
        status = _report(message, None, 2) if message else 2
    except BrokenPipeError:
        # The reader closed the pipe; flushing the rest of the buffer at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except MemoryError:
        status = _report("Not enough memory for this model.", "Use a machine with more memory, or a smaller model.", 1)
    except OSError as error:  # a full disk, a folder without write permission
        _trace(debug)
        reason = str(error.strerror or error).strip() or type(error).__name__
        status = _report(reason.splitlines()[0] + (f": {error.filename}" if error.filename else ""), None, 1)
    except BaseException as error:
        # A panic of a Rust library, such as tokenizers; it is not an Exception, and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        _trace(debug)
        status = _report(f"A library failed on a file of the model: {reason_of(error)}", None, 1)
    sys.exit(status)


_WITH_RESUME = "Run the same command again with --resume to continue where it stopped."
# Hints after Ctrl-C, by command.
_AFTER_INTERRUPT = {
    "push": _WITH_RESUME,
    "prune": _WITH_RESUME,
    "demo": _WITH_RESUME,
    "evaluate": "Run the same command again to continue where it stopped; record and card are unchanged.",
    "sweep": "Run the same command again to continue where it stopped.",
}


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _report(message: str, hint: str | None, status: int) -> int:
    # A line feed in a name would begin a line of its own.
    stderr.print(f"[red]error[/] {escape(printable(message))}", highlight=False)
    if hint:
        stderr.print(f"      {escape(printable(hint))}", highlight=False)
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


_COMMANDS = (
    push,
    prune,
    heal,
    inspect,
    publish,
    export,
    space,
    evaluate,
    generate,
    serve,
    sweep,
    hub,
    demo,
    listing,
    doctor,
)
for _command in _COMMANDS:
    _command.register(app)
