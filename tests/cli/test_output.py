"""Names of others on the terminal: shown as they are written, obeyed never."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.markup import escape
from rich.table import Table

from gradmap_hub.cli import app, generate, output, tables
from gradmap_hub.cli.options import with_kind
from gradmap_hub.cli.output import Result, SafeConsole, emit
from gradmap_hub.cli.terminal import TerminalReporter

TITLE, CLIPBOARD, HIDDEN = "\x1b]0;owned\x07", "\x1b]52;c;b3duZWQ=\x07", "\x9b8m"
HOSTILE = f"[bold red]:fire:{TITLE}{CLIPBOARD}{HIDDEN}\r[/]"
# What remains of it on a line.
HARMLESS = r"[bold red]:fire:\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x9b8m"


def codes(text: str) -> list[str]:
    """The control characters in an output, without rich's own colours and cursor movements."""
    ours = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [character for character in ours if not character.isprintable() and character not in "\n\r"]


@pytest.fixture
def screen() -> SafeConsole:
    return SafeConsole(
        file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True, emoji=False, width=200
    )


def written(console: SafeConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_and_tables(screen: SafeConsole) -> None:
    table = Table("name", title=escape(HOSTILE))
    table.add_row(escape(HOSTILE))
    for part in (escape(HOSTILE), table, f"[green]ok[/] {escape(HOSTILE)}"):
        screen.print(part, highlight=False)
    found = written(screen)
    assert not codes(found)
    assert found.count(r"\x1b]0;owned") == 4 and found.count(":fire:") == 4 and found.count("[bold red]") == 4


def test_progress(screen: SafeConsole) -> None:
    with TerminalReporter(screen) as reporter:
        reporter.start(HOSTILE)
        reporter.total(2)
        reporter.advance()
        reporter.note(f"{HOSTILE}\ndone  all checks")
        reporter.finish(HOSTILE)
    found = written(screen)
    assert not codes(found) and HARMLESS in found
    assert not any(line.startswith("done  all") for line in found.splitlines())


def test_an_error_is_one_line(screen: SafeConsole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "stderr", screen)
    assert app._report(f"No such model: {HOSTILE}\ndone", f"Try {HOSTILE}.", 1) == 1
    found = written(screen)
    assert not codes(found) and len(found.splitlines()) == 2 and HARMLESS in found


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Result({"name": HOSTILE + "\ud800"}), as_json=True)
    found = capsys.readouterr().out
    assert not codes(found) and json.loads(found) == {"name": HOSTILE + "\ud800"}


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    answer: Any = iter(["one\n", "\ttwo\x1b", "]0;owned\x07"])
    generate._stream(answer)
    assert screen.getvalue() == ("one\n\ttwo]0;owned\n" if terminal else f"one\n\ttwo{TITLE}\n")


def test_logs_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What transformers logs about somebody's files, and what `serve` logs about its clients."""
    factory, formatwarning = logging.getLogRecordFactory(), warnings.formatwarning
    stream, log = io.StringIO(), logging.getLogger("another.library")
    plain, lines = logging.StreamHandler(stream), logging.StreamHandler(stream)
    plain.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    lines.setFormatter(output.LogLines("%(message)s"))
    try:
        output.escape_logs()
        for handler in (plain, lines):
            log.addHandler(handler)
            log.warning("Unknown field %s in %r", HOSTILE, HOSTILE)
            try:
                raise ValueError(HOSTILE)
            except ValueError:
                log.exception(f"failed\n{HOSTILE}")
            log.removeHandler(handler)
        shown = warnings.formatwarning(f"old {HOSTILE}", UserWarning, "file.py", 1)
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatwarning
    found = stream.getvalue()
    of_lines = found[found.rindex("Unknown field") :]
    assert (
        not codes(of_lines) and r"failed\n[bold red]" in of_lines and of_lines.startswith(f"Unknown field {HARMLESS}")
    )
    first = found[: found.rindex("Unknown field")]
    assert not codes(first.partition("Traceback")[0]) and HARMLESS in first
    assert not codes(shown) and HARMLESS in shown


def test_the_consoles_of_the_command_line_are_safe() -> None:
    for console in (output.stdout, output.stderr):
        assert isinstance(console, SafeConsole) and not console._emoji


def test_the_end_of_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """The QR code is that of the Space's address, for a terminal only; the last line runs the comparison here."""
    import segno
    from rich.text import Text

    url = "https://huggingface.co/spaces/ada/small-compare"
    result: Any = SimpleNamespace(space=SimpleNamespace(url=url), space_kind="browser", folder=Path("a b"))
    for terminal, quiet, shown in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(tables, "stdout", SimpleNamespace(is_terminal=terminal))
        *code, last = tables.next_view(result, quiet=quiet)
        assert last == "try it here  gradmap-hub compare 'a b' --in browser"
        assert any(isinstance(part, Text) for part in code) == shown
    rows = tables.qr_code(url).splitlines()
    # Each character is two modules, the upper one and the lower; what is drawn is light.
    light = [[letter in upper for letter in row] for row in rows for upper in ("█▀", "█▄")]
    matrix = [[not module for module in row] for row in segno.make(url, error="l", micro=False).matrix]
    found = [row[2:-2] for row in light[2 : 2 + len(matrix)]]
    assert found == matrix and all(light[0][:-1])
    result.space, result.space_kind = None, ""
    assert list(tables.next_view(result, quiet=False)) == ["try it here  gradmap-hub compare 'a b'"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("push m --space --public", "push m --space=auto --public"),
        ("publish f --space", "publish f --space=auto"),
        ("push m --space browser", "push m --space browser"),
        ("push m --space=zero", "push m --space=zero"),
        ("space f --space -q", "space f --space -q"),
        ("", ""),
    ],
)
def test_space_was_a_flag(given: str, expected: str) -> None:
    assert with_kind(given.split()) == expected.split()
