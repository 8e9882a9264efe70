"""What commands print: JSON or a view, never both, and foreign text as it is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console, RenderableType

from gradmap_hub.cli.output import Result, emit
from gradmap_hub.cli.tables import plan_view
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.pipeline.checks import Check

HOSTILE = "acme/[red]x[/] [link=http://nowhere]"


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def view() -> Iterator[RenderableType]:
        raise AssertionError("the view is not rendered")
        yield ""

    emit(Result({"name": HOSTILE, "é": 1.5}, view()), True)
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": HOSTILE, "é": 1.5} and "é" in out and out.endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        emit(Result({"loss": float("nan")}), True)


def test_a_plan_shows_foreign_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    view = plan_view({"model": HOSTILE}, [Check("target", f"{HOSTILE} is free")], "Nothing was changed.")
    emit(Result({"model": HOSTILE}, view), False)
    out = capsys.readouterr().out
    assert out.count(HOSTILE) == 2 and out.endswith("\n\nNothing was changed.\n")


def test_the_reporter_removes_its_bar_after_an_error() -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), TerminalReporter(Console(file=out, force_terminal=True)) as reporter:
        reporter.start("Scoring [layers]")
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor, while the bar is live and after it
    assert out.getvalue().rfind(shown) > out.getvalue().find(hidden) >= 0
