"""Files of somebody else, bent by a generator, through the commands that read them.

Every run ends in success or in one line, with exit status 1 or 2, within the limits below. MUTATIONS is the number of
files of each kind: 60 unless the environment says otherwise; docs/reliability.md is written with 2,000.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MUTATIONS = int(os.environ.get("MUTATIONS", "60"))
# Seconds of the processor; one that waits for nothing is ended after three minutes.
SECONDS, BYTES = 10.0, 10**9
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 320, 10**6, 10**9, 10**18, 10**400, 0.0, -0.5, 1e-90, 1e300, float("nan"),
    float("inf"), "", "x", "\x1b]0;t\x07", "\ud800", "../x", "/etc/passwd", "a\nb", "|`<b>", "{{ 1 }}", "x" * 100_000,
    [], [0], [1.0, 2.0], ["x"], [None], [[]], {}, {"x": 1}, {"type": "x"}, {"content": "y"}, {"rope_type": "yarn"},
]  # fmt: skip
BYTES_ODD = (b"", b"\0" * 8, b"\xff" * 8, b"{", b"[" * 5_000, b"\xef\xbb\xbf", b'"', b"9" * 40, b"\x1b[31m")


def _places(data: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield where
    inner = data.items() if isinstance(data, dict) else enumerate(data[:8]) if isinstance(data, list) else ()
    for key, value in itertools.islice(inner, 24):  # a vocabulary has thousands of the same kind
        yield from _places(value, (*where, key))


def bent_json(content: bytes, draw: random.Random) -> bytes:
    """One to three changes in a JSON document: a value replaced, removed or doubled, a name added; or in its bytes."""
    if draw.random() < 0.1:
        return bent_bytes(content, draw, len(content))
    data = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        where = draw.choice(list(_places(data)))
        value = copy.deepcopy(draw.choice(ODD))
        if not where:
            data = value if draw.random() < 0.2 else data
            continue
        holder = data
        for key in where[:-1]:
            holder = holder[key]
        change, key = draw.choice(("replace", "replace", "delete", "double", "nest")), where[-1]
        if change == "replace":
            holder[key] = value
        elif change == "delete":
            del holder[key]
        elif change == "nest":
            holder[key] = [holder[key]]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[f"{key}2"] = holder[key]
    return json.dumps(data).encode()


def bent_bytes(content: bytes, draw: random.Random, within: int) -> bytes:
    """One to three changes in the first `within` bytes: some replaced, cut, or doubled."""
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(max(1, within)), draw.choice((1, 1, 4, 8, 64))
        change = draw.choice(("set", "random", "cut", "double", "end"))
        piece = content[at : at + length]
        if change == "end":
            content = content[:at]
            continue
        new = {
            "set": draw.choice(BYTES_ODD),
            "random": draw.randbytes(len(piece)),
            "cut": b"",
            "double": piece * 2,
        }[change]
        content = content[:at] + new + content[at + len(piece) :]
    return content


def bent_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is bent: as JSON, or in its bytes with the length."""
    (length,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.3:
        return bent_bytes(content, draw, length + 8)
    header = bent_json(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


# The commands that read a kind of folder, the cheap ones more often: FOLDER stands for it, OUT for a new folder.
_DRY = ("push", "FOLDER", "--output", "OUT", "--drop", "2", "--dry-run")
_PRUNE = ("prune", "FOLDER", "OUT", "--drop", "2", "--compensation", "none")
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "model": (_DRY, _DRY, _PRUNE),
    "result": (
        ("publish", "FOLDER", "--to", "ada/bent", "--dry-run"), ("space", "FOLDER"),
        ("push", "--from", "FOLDER/gradmap.json", "--output", "OUT", "--dry-run"),
    ),
    "onnx": (("generate", "FOLDER", "The river", "--max-tokens", "2"),),
}  # fmt: skip
# Kind of file -> kind of folder, file, how it is bent.
Bend = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, tuple[str, str, Bend]] = {
    "config.json": ("model", "config.json", bent_json),
    "tokenizer.json": ("model", "tokenizer.json", bent_json),
    "tokenizer_config.json": ("model", "tokenizer_config.json", bent_json),
    "special_tokens_map.json": ("model", "special_tokens_map.json", bent_json),
    "generation_config.json": ("model", "generation_config.json", bent_json),
    "safetensors header": ("model", "model.safetensors", bent_header),
    "weight index": ("sharded", "model.safetensors.index.json", bent_json),
    "gradmap.json": ("result", "gradmap.json", bent_json),
    "compare.json": ("result", "../result-space/compare.json", bent_json),
    "config.json of ONNX": ("onnx", "config.json", bent_json),
    "tokenizer.json of ONNX": ("onnx", "tokenizer.json", bent_json),
    "tokenizer_config.json of ONNX": ("onnx", "tokenizer_config.json", bent_json),
    "generation_config.json of ONNX": ("onnx", "generation_config.json", bent_json),
    "ONNX graph": ("onnx", "onnx/model.onnx", lambda content, draw: bent_bytes(content, draw, 4_000)),
}


@pytest.fixture(scope="module")
def folders(world: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, that every command takes."""
    from gradmap_hub.models import checkpoint

    root = tmp_path_factory.mktemp("bent")
    shutil.copytree(world.base, root / "model")
    shutil.copytree(world.base, root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    model, _ = checkpoint.load_model(world.base)
    limit, checkpoint.SHARD_LIMIT = checkpoint.SHARD_LIMIT, "200KB"
    checkpoint.save_checkpoint(model, root / "sharded", model.dtype)
    checkpoint.SHARD_LIMIT = limit
    done = world.cli.run("prune", "acme/tiny", root / "result", "--drop", "2", *world.cli.quick)
    assert done.code == 0, done.err
    done = world.cli.run("space", root / "result")
    assert done.code == 0, done.err
    shutil.copytree(tiny.original, root / "onnx")
    (root / "onnx" / "onnx").mkdir()
    shutil.copy(tiny.original_onnx / "model.onnx", root / "onnx" / "onnx")
    return {path.name: path for path in root.iterdir()}


def _run(world: Any, folder: Path, command: tuple[str, ...]) -> Any:
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("out.work"), ignore_errors=True)
    arguments = [part.replace("FOLDER", str(folder)).replace("OUT", str(out)) for part in command]
    return world.cli.run(*arguments, *(world.cli.quick if command[0] in ("push", "prune") else ()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bent_file_ends_in_success_or_in_one_line(
    kind: str, world: Any, folders: dict[str, Path], tmp_path: Path, record_property: Any
) -> None:
    holder, name, bend = KINDS[kind]
    commands = COMMANDS["model" if holder == "sharded" else holder]
    for path in folders["model"].parent.iterdir():
        if path.name.startswith(holder):
            shutil.copytree(path, tmp_path / path.name)
    folder = tmp_path / holder
    whole = (folder / name).read_bytes()
    for command in commands:
        done = _run(world, folder, command)
        assert done.code == 0, (command, done.err)
    draw = random.Random(kind)
    codes, slowest, largest, wrong = {0: 0, 1: 0, 2: 0}, 0.0, 0, []
    for number in range(MUTATIONS):
        content, command = bend(whole, draw), draw.choice(commands)
        if holder == "result":  # commands change the folder
            shutil.copytree(folders["result"], folder, dirs_exist_ok=True)
            shutil.copytree(folders["result-space"], tmp_path / "result-space", dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        done = _run(world, folder, command)
        slowest, largest = max(slowest, done.seconds), max(largest, done.bytes or 0)
        shown = [line for line in done.err.splitlines() if not line.startswith(" ") and line.strip()]
        if (
            done.code not in codes
            or "Traceback" in done.err
            or done.seconds > SECONDS
            or (done.bytes or 0) > BYTES
            or (done.code and not any(line.startswith("error ") for line in shown))
            or any(ord(character) < 32 and character not in "\n\t\r" for character in done.err + done.out)
        ):
            kept = Path(os.environ.get("BENT", tmp_path)) / f"{kind.replace(' ', '_')}-{number}"
            kept.write_bytes(content)
            wrong.append(f"{kept} {command[0]}: {done.code}, {done.seconds:.1f} s, {done.bytes}: {done.err[-300:]}")
        else:
            codes[done.code] += 1
    assert not wrong, "\n".join(wrong[:20])
    for column, cell in {
        "files": f"{MUTATIONS:,}",
        "taken": f"{codes[0]:,}",
        "refused in one line": f"{codes[1] + codes[2]:,}",
        "slowest": f"{slowest:.1f} s",
        "largest process": f"{largest / 1e6:.0f} MB",
    }.items():
        record_property("reliability", ("Bent files", kind, column, cell))
