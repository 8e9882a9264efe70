"""Who may import whom, and what an answer to `--help` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradmap_hub"
LEAVES = {
    "accounts",
    "architectures",
    "config",
    "contents",
    "errors",
    "freshness",
    "generations",
    "knee",
    "patience",
    "progress",
    "prompting",
    "record",
    "screening",
    "source",
    "spaceplan",
    "stages",
    "sweeprecord",
    "targets",
}
NUMERIC = {
    "calibration",
    "compensation",
    "contamination",
    "decoder",
    "evaluation",
    "gguf_source",
    "harness",
    "heal",
    "parts",
    "pruning",
    "residual",
    "ridge",
    "scoring",
    "search",
    "selection",
    "speed",
    "streaming",
    "verification",
}
# What a numeric module may take from another one: the dataclass that is its input.
INPUT_TYPES = {"selection": "scoring.LayerScores", "compensation": "calibration.CalibrationRows"}
# Closed forms that a stage applies, split off because they need no model; healing goes on where the correction ended,
# with its rule for what counts as a gain.
FORMULAS = {
    "compensation": {"residual", "ridge"},
    "residual": {"ridge"},
    "heal": {"calibration", "compensation"},
    "speed": {"runtime"},  # what it times
    "streaming": {"parts"},
}
HUB_USERS = {"pipeline", "publishing", "guard", "refusals", "collecting", "spacewatch", "xet", "cli", "demo"}
HUB_NAMERS = {"evaluating", "plan", "publishplan", "redraw", "repeat", "run"}  # for type checkers only
# Who writes to the Hub, and who may have it written.
WRITERS = {"pipeline"}
HEAVY = ("torch", "transformers", "huggingface_hub", "onnxruntime")


def imports(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, wherever the statement stands, and whether only type checkers see it."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), package, False)


def _imports(node: ast.AST, package: str, typing_only: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from _imports(child, package, True)
        for child in node.orelse:
            yield from _imports(child, package, typing_only)
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield base, typing_only
        yield from ((f"{base}.{alias.name}", typing_only) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, typing_only)


def ours(path: Path, package: str = "gradmap_hub") -> Iterator[tuple[str, bool]]:
    """The modules of this package that a file imports, by their name in it; the package itself is ''."""
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {"local_hub", "exporters", "model_cards", "runtime", "spaces"}
    for name, typing_only in imports(path, package):
        head, *rest = name.split(".")
        if head != "gradmap_hub":
            continue
        if not rest:
            yield "", typing_only
        elif rest[0] in modules:
            yield rest[0], typing_only


def names(path: Path) -> set[str]:
    return {name for name, _ in ours(path) if name}


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*.py"))


def test_the_rules_can_be_broken(tmp_path: Path) -> None:
    """The reader of imports sees each way to write one."""
    path = tmp_path / "sample.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import gradmap_hub.hub.client\n"
        "from gradmap_hub import cli, __version__\n"
        "from . import run\n"
        "def later():\n    from gradmap_hub.pruning.scoring import LayerScores\n"
        "if TYPE_CHECKING:\n    from gradmap_hub.space.app import SpacePlan\n"
    )
    assert dict(ours(path)) == {"": False, "hub": False, "cli": False, "run": False, "scoring": False, "space": True}
    inner = {name for name, _ in imports(path, "gradmap_hub.local_hub")}
    assert "gradmap_hub.local_hub.run" in inner


def test_every_module_named_here_exists() -> None:
    assert {path.stem for path in modules()} >= LEAVES | NUMERIC | HUB_USERS | HUB_NAMERS


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_only_leaves(name: str) -> None:
    assert names(PACKAGE / f"{name}.py") <= LEAVES - {name}


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_numeric_modules_import_leaves_and_the_decoder(name: str) -> None:
    module, _, type_name = INPUT_TYPES.get(name, "").partition(".")
    path = PACKAGE / f"{name}.py"
    assert names(path) <= (LEAVES | {"decoder", module} | FORMULAS.get(name, set())) - {name}
    if module:
        taken = {found for found, _ in imports(path, "gradmap_hub") if found.startswith(f"gradmap_hub.{module}")}
        assert taken == {f"gradmap_hub.{module}", f"gradmap_hub.{module}.{type_name}"}


def test_only_those_who_tell_the_story_talk_to_the_hub() -> None:
    for path in modules():
        for name, typing_only in ours(path):
            if name == "hub":
                assert path.stem in HUB_USERS or (path.stem in HUB_NAMERS and typing_only), path.stem


def test_only_the_pipeline_has_something_published() -> None:
    for path in modules():
        found = {typing_only for name, typing_only in ours(path) if name == "publishing"}
        assert not found or path.stem in WRITERS or (path.stem in HUB_NAMERS and found == {True}), path.stem


def test_only_main_imports_the_command_line() -> None:
    importers = {path.stem for path in modules() if "cli" in names(path)}
    importers |= {path.stem for folder in ("exporters", "spaces") for path in (ROOT / folder).glob("*.py")
                  if "cli" in names(path)}  # fmt: skip
    assert importers == {"__main__"}


def test_options_are_for_the_command_line() -> None:
    importers = {path.stem for path in modules() if "cli_options" in names(path)}
    assert importers >= {"cli", "cli_sweep"} and all(name.startswith("cli") for name in importers)


def test_the_embedded_hub_stands_alone() -> None:
    files = list((PACKAGE / "local_hub").rglob("*.py"))
    assert len(files) > 10
    for path in files:
        package = ".".join(["gradmap_hub", *path.parent.relative_to(PACKAGE).parts])
        assert {name for name, _ in ours(path, package)} <= {"local_hub"}, path


def test_the_runtime_needs_leaves_and_for_repositories_the_hub() -> None:
    files = list((PACKAGE / "runtime").glob("*.py"))
    assert len(files) > 4
    for path in files:
        allowed = LEAVES | {"runtime"} | ({"hub"} if path.stem == "loading" else set())
        assert {name for name, _ in ours(path, "gradmap_hub.runtime") if name} <= allowed, path


def test_the_runtime_starts_without_torch() -> None:
    heavy = ("torch", "transformers", "optimum", "huggingface_hub")
    done = run("-c", f"import sys, gradmap_hub.runtime as r; r.load; print([n for n in {heavy!r} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_space_imports_nothing_of_ours() -> None:
    files = [*(ROOT / "spaces").glob("*.py"), PACKAGE / "prompting.py"]
    assert len(files) > 4
    for path in files:
        assert not list(ours(path)), path
    assert not (ROOT / "spaces" / "__init__.py").exists()  # PyPI's `spaces` is imported by that name


def test_exporters_import_leaves_and_each_other() -> None:
    for path in (ROOT / "exporters").glob("*.py"):
        assert names(path) <= LEAVES | {"exporters"}, path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    done = run("-c", f"import sys, gradmap_hub.cli.app; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    ["compare", "demo", "evaluate", "export", "generate", "hub", "inspect", "prune", "publish", "push", "serve",
     "space", "sweep"],
)  # fmt: skip
def test_every_command_explains_itself(command: str) -> None:
    done = run("-m", "gradmap_hub", command, "-h")
    assert done.returncode == 0 and "Usage" in done.stdout and "Example" in done.stdout, done.stderr


def test_help_answers_within_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = run("-m", "gradmap_hub", "--help")
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0 and "push" in done.stdout
        if seconds[-1] < 1:
            return
    pytest.fail(f"took {min(seconds):.2f} s at best")
