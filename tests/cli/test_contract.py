"""What others read or type does not change unnoticed: the keys of gradmap.json, compare.json, sweep.json and of every
`--json` answer, the files of a pushed folder and of its Space, every command with its arguments and options.

All of it comes from `python -m gradmap_hub`: no module of the package is named here, so that modules can move. Keys and
types are compared, values are not. After an intended change, write the golden file anew and read its diff:

    GRADMAP_UPDATE_GOLDEN=1 pytest -m '' tests/cli/test_contract.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.models.transformers_compat import has_5

pytestmark = pytest.mark.long  # every command once

Shape = dict[str, str]

GOLDEN = Path(__file__).parents[1] / "golden" / "contract.json"
UPDATE = "GRADMAP_UPDATE_GOLDEN" in os.environ
# Mappings whose keys depend on the machine: stages, installed packages, metrics above chance.
OPEN = ("timings", "versions", "seconds", "retention", "packages")
# Null on some machines: where the system does not tell, where the original is at chance, and of a CPU.
EITHER = {
    "speed[].memory": "int|null",
    "metrics[].retention": "float|null",
    "devices[].memory": "int|null",
}
# What `demo` adds to the answer of push, from its source: it only takes a model of 135M parameters, which it downloads.
# tests/test_demo.py runs it and compares its answer with the golden file.
DEMO = ["answers", "command", "differences", "hub", "hub_root"]
# Starts the package as `python -m` does, and prints its commands instead of running one.
INTERFACE = """
import json, runpy, sys, typer

def described(command):
    found = {}
    for entry in command.params:
        option = entry.param_type_name == "option"
        words = ["flag" if getattr(entry, "is_flag", False) else entry.param_type_name]
        words += ["required"] if entry.required else [f"default {entry.default}"]
        words += ["repeatable"] if getattr(entry, "multiple", False) or entry.nargs != 1 else []
        found[" ".join([*entry.opts, *entry.secondary_opts]) if option else entry.name] = ", ".join(words)
    return found

def show(app, *_, **__):
    root = typer.main.get_command(app)
    found = {"": described(root)} | {name: described(command) for name, command in root.commands.items()}
    print(json.dumps(found))
    sys.exit()

typer.Typer.__call__ = show
sys.argv = ["gradmap-hub", "--help"]
runpy.run_module("gradmap_hub", run_name="__main__")
"""


def shape_of(samples: Sequence[Any], path: str = "") -> Shape:
    """The type of the value at each path, as {"base.commit": "null|str", "layers[].score": "float"}. `samples`: all
    values at `path`; their types are united. A key that only some of the objects have is also `absent`."""
    kinds = {"null" if value is None else type(value).__name__ for value in samples}
    objects = [value for value in samples if isinstance(value, dict)]
    items = [item for value in samples if isinstance(value, list) for item in value]
    if objects and path.rpartition(".")[2] in OPEN:
        return {path: "mapping"}
    found = {path: "|".join(sorted(kinds))}
    for name in sorted({name for value in objects for name in value}):
        there = [value[name] for value in objects if name in value]
        place = f"{path}.{name}" if path else name
        found |= shape_of(there, place)
        if len(there) < len(objects):
            found[place] += "|absent"
    if items:
        found |= shape_of(items, f"{path}[]")
    return {place: next((EITHER[end] for end in EITHER if place.endswith(end)), kind) for place, kind in found.items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def lines(value: Any, path: str = "") -> Iterator[str]:
    """One line per leaf, so that a failure shows what differs and where."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from lines(entry, f"{path}{name}: ")
    elif isinstance(value, list):
        for entry in value:
            yield from lines(entry, path)
    else:
        yield f"{path}{value}"


def compare(section: str, found: Any) -> None:
    """Compare with a section of the golden file, or write that section anew."""
    golden = read(GOLDEN) if GOLDEN.exists() else {}
    if UPDATE:
        text = json.dumps(golden | {section: found}, indent=1, sort_keys=True)
        GOLDEN.write_text(text + "\n", encoding="utf-8")
        return
    recorded, now = set(lines(golden[section])), set(lines(found))
    missing = [f"- {line}" for line in sorted(recorded - now)]
    added = [f"+ {line}" for line in sorted(now - recorded)]
    assert not missing and not added, "\n".join([f"not as in {GOLDEN.name}, {section}:", *missing, *added])


@dataclasses.dataclass
class Records:
    """Runs commands, and keeps their answers and the files they write under their names in the golden file."""

    world: Any
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def pushed(self) -> Path:
        return self.world.root / "pushed"

    def run(self, name: str, *arguments: str | Path) -> None:
        done = self.world.cli.run(*arguments, "--json")
        assert done.code == 0, (name, done.err)
        self.values[f"answer of {name}"] = done.json

    def look(self, name: str, path: Path) -> None:
        self.values[f"{path.name} after {name}"] = read(path)

    def evaluate(self, name: str, tasks: Path, *options: str) -> None:
        self.run(name, "evaluate", self.pushed, "--text", self.world.text, "--tasks", "arc_easy,wikitext",
                 "--tasks-from", tasks, "--limit", "2", "--seq-len", "32", "--rows", "4", *options)  # fmt: skip
        self.look(name, self.pushed / "gradmap.json")

    def shapes(self) -> dict[str, Shape]:
        return {name: shape_of([value]) for name, value in self.values.items()}


@pytest.fixture(scope="module")
def pushed(world: Any) -> Records:
    """One push of a tiny model, with everything."""
    found, quick = Records(world), world.cli.quick
    run, look, pushed = found.run, found.look, found.pushed
    facts = world.root / "pushed-space" / "compare.json"

    push = ["push", "acme/tiny", "--layers", "2", "--output", pushed, *quick]
    run("push --dry-run", *push, "--dry-run")
    run("push", *push, "--heal", "2", "--heal-text", world.text, "--collection", "Small ones")
    look("push", pushed / "gradmap.json")
    look("push", facts)
    found.files = {"pushed folder": names_in(pushed), "Space folder": names_in(facts.parent)}
    return found


@pytest.fixture(scope="module")
def records(pushed: Records, world: Any, task_documents: Path) -> Records:
    """Every command that has `--json`, except `demo`, on a tiny model; most run on the folder of one push."""
    found, root, quick = dataclasses.replace(pushed), world.root, world.cli.quick
    run, look, pushed_folder = found.run, found.look, found.pushed
    facts = root / "pushed-space" / "compare.json"

    found.evaluate("evaluate --no-speed", task_documents, "--no-speed")
    look("evaluate --no-speed", facts)
    run("publish --dry-run", "publish", pushed_folder, "--to", "ada/again", "--dry-run")
    run("publish", "publish", pushed_folder, "--to", "ada/again", "--wait-space", "0")
    world.hub.seed("acme/theirs", world.base)
    run("publish --create-pr", "publish", pushed_folder, "--to", "acme/theirs", "--create-pr")
    run("generate", "generate", pushed_folder, "The river", "--max-tokens", "4")

    run("prune", "prune", "acme/tiny", root / "pruned", "--layers", "2", *quick)
    look("prune", root / "pruned" / "gradmap.json")
    run("space", "space", root / "pruned", "--text", world.text)  # of a folder without ONNX files
    look("space", root / "pruned-space" / "compare.json")
    run("export", "export", root / "pruned", "--to", "int8", "--text", world.text)
    look("export", root / "pruned" / "gradmap.json")
    run("inspect", "inspect", "acme/tiny", "--samples", "4", "--seq-len", "32", "--calibration", world.text)
    run("sweep", "sweep", "acme/tiny", root / "swept", "--ratios", "0.2,0.4", "--max-loss", "1e6", *quick)
    look("sweep", root / "swept" / "sweep.json")
    run("list", "list", root)
    run("clean --dry-run", "clean", root, "--dry-run")
    run("doctor", "doctor")
    return found


@pytest.mark.slow
def test_json_has_the_same_keys(records: Records) -> None:
    compare("shapes", records.shapes())


@pytest.mark.skipif(has_5(), reason="transformers 5 saves no special_tokens_map.json")
def test_folders_have_the_same_files(pushed: Records) -> None:
    compare("files", pushed.files)


@pytest.mark.slow  # `evaluate` measures memory in a process per backend, and `space` quantises the original
def test_what_takes_longer_has_the_same_keys(records: Records, task_documents: Path) -> None:
    further, pruned = Records(records.world), records.world.root / "pruned"
    further.evaluate("evaluate", task_documents)
    further.run("space with int8", "space", pruned, "--text", records.world.text)
    further.look("space with int8", pruned.with_name("pruned-space") / "compare.json")
    compare("slow", further.shapes())


def test_commands_have_the_same_options(world: Any) -> None:
    cli = world.cli
    done = subprocess.run(
        [sys.executable, "-c", INTERFACE], cwd=cli.home, env=cli.environment(None, {}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compare("commands", json.loads(done.stdout))


def test_demo_is_recorded() -> None:
    compare("demo", DEMO)
