"""The tables that tests write into the documentation (RELIABILITY=FILE): by runs of pytest with tests/conftest.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

ROWS = {rows!r}

@pytest.mark.parametrize("row", ROWS)
def test_first(row, record_property):
    record_property("reliability", ("things", row, "first", "yes"))

@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_second(row, record_property):
    assert {passes!r}
    record_property("reliability", ("things", row, "second", {cell!r}))
"""
BEFORE = "Words.\n\n<!-- things -->\n"
AFTER = "<!-- end -->\n\n<!-- others -->\n\n| | first |\n|---|---|\n| a | ? |\n\n<!-- end -->\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "forks.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib --strict-markers -m 'not slow'\n"
        "markers =\n    slow:\n    real:\n    long:\n"
    )
    path = tmp_path / "table.md"
    path.write_text(BEFORE + AFTER)
    return path


def run(file: Path, *arguments: str, rows: str = "abc", cell: str = "yes", passes: bool = True) -> int:
    folder = file.parent
    (folder / "tests" / "test_made.py").write_text(TESTS.format(rows=rows, cell=cell, passes=passes))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"RELIABILITY": file.name, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer than the tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", *(arguments or ("-m", ""))]
    if not any(argument.startswith("tests/") for argument in arguments):
        command.append("tests/test_made.py")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode


def table(file: Path) -> list[str]:
    """The rows; what is around the table is checked to be as it was."""
    text = file.read_text()
    assert text.startswith(BEFORE) and text.endswith(AFTER)
    return [line for line in text.removeprefix(BEFORE).removesuffix(AFTER).splitlines() if line]


HEAD = ["| | first | second |", "|---|---|---|"]
WHOLE = [*HEAD, "| a | yes | yes |", "| b | yes | yes |", "| c | yes | yes |"]


def test_a_whole_run_writes_the_table_and_drops_rows_that_are_no_more(file: Path) -> None:
    run(file)
    assert table(file) == WHOLE
    run(file, rows="ac")
    assert table(file) == [*HEAD, "| a | yes | yes |", "| c | yes | yes |"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "", "-k", "second and b"),
        ("-m", "", "tests/test_made.py::test_second[b]"),
        ("-m", "slow", "-k", "b"),
        ("-m", "", "-k", "second and b", "-n", "1"),
    ],
)
def test_a_run_of_some_tests_leaves_the_other_cells_alone(file: Path, arguments: tuple[str, ...]) -> None:
    run(file)
    run(file, *arguments, cell="no: reason")
    assert table(file) == [*HEAD, "| a | yes | yes |", "| b | yes | no: reason |", "| c | yes | yes |"]


def test_a_run_without_slow_tests_is_one_of_some(file: Path) -> None:
    run(file)
    run(file, "tests/test_made.py", rows="ac")
    assert table(file) == WHOLE


def test_a_new_row_and_a_new_column_come_last(file: Path) -> None:
    run(file, "tests/test_made.py", rows="ab")
    assert table(file) == ["| | first |", "|---|---|", "| a | yes |", "| b | yes |"]
    run(file, "-m", "", *(f"tests/test_made.py::test_second[{row}]" for row in "ca"))
    assert table(file) == [*HEAD, "| a | yes | yes |", "| b | yes | - |", "| c | - | yes |"]


def test_a_run_that_fails_writes_nothing(file: Path) -> None:
    run(file)
    assert run(file, rows="ab", passes=False) == 1
    assert table(file) == WHOLE
