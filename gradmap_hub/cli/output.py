"""Where the command line prints: results on stdout, as JSON or for a reader; progress and errors on stderr."""

from __future__ import annotations

import codecs
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from gradmap_hub.units import printable, printable_json


class SafeConsole(Console):
    """A console that writes no escape codes except those of its own styles. All output passes `render`, which escapes
    unprintable characters in names of folders, models and licences."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)


# Without emoji, which a name like `:fire:` would become.
stdout = SafeConsole(soft_wrap=True, emoji=False)
stderr = SafeConsole(stderr=True, soft_wrap=True, emoji=False)


def escape_unknown_characters() -> None:
    """Make stdout and stderr write a character that their encoding (cp1252, ascii) lacks as \\uXXXX, which is valid in
    JSON too, instead of failing at the end of a run."""

    def escaped(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        # json writes a character beyond U+FFFF as two escapes.
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end

    codecs.register_error("gradmap-escape", escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="gradmap-escape")


def escape_logs() -> None:
    """Write log records and warnings of every library without control characters: transformers warns with names of a
    model's files and fields, and `serve` logs what clients send."""
    plain_record, plain_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = plain_record(*args, **options)
        try:
            made.msg, made.args = printable(made.getMessage(), keep="\n\t"), None
        except Exception:  # the library passed wrong arguments; logging reports it
            return made
        return made

    def warning(*args: Any, **options: Any) -> str:
        return printable(plain_warning(*args, **options), keep="\n\t")

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning


class LogLines(logging.Formatter):
    """Formats each log record as one line without control characters, then the lines of its exception, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei), keep="\n")


@dataclass(frozen=True)
class Result:
    """What a command prints.

    `json`: the object that --json prints. `view`: lines of rich markup and tables for a reader, printed in order; a
    generator is only run if they are printed. External text in it is escaped.
    """

    json: Mapping[str, Any]
    view: Iterable[RenderableType] = ()


def emit(result: Result, as_json: bool) -> None:
    """Print a result on stdout, once: its JSON object, or its view."""
    if as_json:
        print(printable_json(json.dumps(result.json, indent=2, ensure_ascii=False, allow_nan=False)), flush=True)
        return
    for part in result.view:
        stdout.print(part, highlight=False if isinstance(part, str) else None)
