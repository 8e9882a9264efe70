"""Who may import whom, and what an answer to `--help` may cost."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_hub.cli.app import app
from gradmap_hub.space.app import STANDALONE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradmap_hub"
# Root modules that everything may import. They import nothing of ours but each other.
LEAVES = {
    "budget",
    "comparison",
    "config",
    "distributed",
    "errors",
    "figures",
    "files",
    "folder_config",
    "formats",
    "layout",
    "machine",
    "measurements",
    "progress",
    "reading",
    "record",
    "units",
}
# Per package, or module at the root, the others it may import besides the leaves. What is not listed here fails.
RULES: dict[str, set[str]] = {
    "models": set(),
    "data": {"models"},
    "pruning": {"models", "data"},
    "healing": {"models", "data", "pruning", "runtime"},
    "evaluation": {"models", "data", "runtime"},
    "sweeping": {"evaluation"},
    "card": {"models"},
    "space": {"models"},
    "exporters": {"models"},
    "hub": {"models", "local_hub"},
    "local_hub": set(),
    "runtime": {"models", "hub"},
    "serving": {"runtime"},
    "stage_cache": set(),
    "pipeline": {
        "models", "data", "pruning", "healing", "evaluation", "sweeping", "card", "space", "exporters", "hub",
        "local_hub", "runtime", "stage_cache",
    },
    "cli": {"pipeline", "card", "hub", "local_hub", "pruning", "runtime", "serving", "space", "sweeping", "models"},
    "__main__": {"cli"},
    "api": {"pipeline", "runtime", "sweeping"},
    "__init__": {"api"},
}  # fmt: skip
# Modules that only these packages may import.
ONLY = {"hub.publisher": {"hub", "pipeline"}, "stage_cache": {"pipeline"}, "huggingface_hub": {"hub"}}
HEAVY = ("torch", "transformers", "huggingface_hub", "onnxruntime")


@functools.cache  # every row of the table reads the whole tree
def imports(path: Path, package: str) -> tuple[tuple[str, bool], ...]:
    """Every module that a file imports, wherever the statement stands, and whether only type checkers see it."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), package, False))


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


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name without `gradmap_hub.`; a package's own file by that of the package."""
    found: dict[str, Path] = {}
    for prefix, folder in (("", PACKAGE), ("exporters.", ROOT / "exporters")):
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[(prefix + name).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def unit(name: str) -> str:
    """The package, or the module at the root, that a module belongs to."""
    return name.partition(".")[0]


def ours(path: Path, package: str = "gradmap_hub") -> Iterator[tuple[str, bool]]:
    """The modules of ours that a file imports, by dotted name, and whether only type checkers see it."""
    for name, typing_only in imports(path, package):
        head, _, rest = name.partition(".")
        while head == "gradmap_hub" and rest:
            if rest in MODULES:
                yield rest, typing_only
                break
            rest = rest.rpartition(".")[0]


def dependencies() -> dict[str, set[str]]:
    """Package or root module -> the other packages and root modules that it imports anywhere."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        package = ".".join(["gradmap_hub", *name.split(".")[:-1]])
        found.setdefault(unit(name), set()).update(unit(other) for other, _ in ours(path, package))
    return {name: others - {name} for name, others in found.items()}


def test_the_rules_can_be_broken(tmp_path: Path) -> None:
    """The reader of imports sees each way to write one."""
    path = tmp_path / "sample.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import gradmap_hub.hub.client\n"
        "from gradmap_hub import errors, __version__\n"
        "from . import record\n"
        "def later():\n    from gradmap_hub.pruning.scoring import LayerScores\n"
        "if TYPE_CHECKING:\n    from gradmap_hub.space.plan import SpacePlan\n"
    )
    assert dict(ours(path)) == {
        "hub.client": False, "errors": False, "record": False, "pruning.scoring": False, "space.plan": True,
    }  # fmt: skip
    inner = {name for name, _ in imports(path, "gradmap_hub.local_hub")}
    assert "gradmap_hub.local_hub.record" in inner


def test_every_module_is_under_a_rule() -> None:
    units = {unit(name) for name in MODULES}
    assert units == LEAVES | set(RULES)


@pytest.mark.parametrize("name", sorted(LEAVES | set(RULES)))
def test_imports_follow_the_rules(name: str) -> None:
    found = dependencies()[name]
    assert found <= LEAVES | RULES.get(name, set()), f"{name} imports {found - LEAVES - RULES.get(name, set())}"


def test_packages_form_no_circle() -> None:
    graph = dependencies()
    while free := [name for name, others in graph.items() if not others & set(graph)]:
        for name in free:
            del graph[name]
    assert not graph, {name: others & set(graph) for name, others in graph.items()}


def test_no_module_is_too_long_to_read() -> None:
    """The embedded Hub's store is one subject and longer."""
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in MODULES.items()
        if unit(name) != "local_hub"
    }
    assert not {name: count for name, count in lines.items() if count > 450}


@pytest.mark.parametrize("target", sorted(ONLY))
def test_some_modules_have_few_importers(target: str) -> None:
    wanted = target if target == "huggingface_hub" else f"gradmap_hub.{target}"
    importers = set()
    for name, path in MODULES.items():
        package = ".".join(["gradmap_hub", *name.split(".")[:-1]])
        if any(found == wanted or found.startswith(wanted + ".") for found, _ in imports(path, package)):
            importers.add(unit(name))
    assert importers <= ONLY[target]


def test_the_runtime_starts_without_torch() -> None:
    heavy = ("torch", "transformers", "optimum", "huggingface_hub")
    done = run("-c", f"import sys, gradmap_hub.runtime as r; r.load; print([n for n in {heavy!r} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_space_imports_nothing_of_ours() -> None:
    files = [*(ROOT / "spaces").glob("*.py"), *STANDALONE]
    assert len(files) > 4
    for path in files:
        assert not list(ours(path)), path
    assert not (ROOT / "spaces" / "__init__.py").exists()  # PyPI's `spaces` is imported by that name


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    done = run("-c", f"import sys, gradmap_hub.cli.app; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    ["clean", "compare", "demo", "doctor", "evaluate", "export", "generate", "heal", "hub", "inspect", "list", "prune",
     "publish", "push", "serve", "space", "sweep"],
)  # fmt: skip
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app, [command, "-h"])
    assert done.exit_code == 0 and "Usage" in done.output and "Example" in done.output


def test_help_takes_less_than_a_second() -> None:
    """Of the processor: other work on the machine does not count."""
    spent = []
    for _ in range(5):
        before = os.times()
        done = run("-m", "gradmap_hub", "--help")
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and "push" in done.stdout
        if spent[-1] < 1:
            break
    assert min(spent) < 1
