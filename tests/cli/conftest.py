"""The command line as a user runs it: a process of its own, the real client, an embedded Hub in the test process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from forks import PLACEHOLDERS, Forks

from gradmap_hub.local_hub import LocalHub, Request

# Of all worlds, by kind: to import everything takes longer than most commands here.
FORKS: dict[str, Forks] = {}
WORDS = "the a river stone light moves under over small green old house wind water bird sings and walks long road"
# Loaded by every interpreter before anything else: the client sleeps 23 s between retries, and disks do not fill up
# on demand.
SITECUSTOMIZE = """
import os, time
_sleep = time.sleep
def apply():
    if "TEST_SHORT_SLEEPS" in os.environ:
        time.sleep = lambda seconds: _sleep(min(seconds, 0.2))
    if "TEST_FREE_BYTES" in os.environ:
        import shutil
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, int(os.environ["TEST_FREE_BYTES"]))
apply()
"""


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; what is missing has none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    seconds: float  # of the processor, from a fork: other work on the machine does not count; else of the clock
    torch: bool | None = None  # whether it was imported; None where the process cannot tell
    bytes: int | None = None  # the largest memory of the process or a child of it; None where that is not measured

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


class Cli:
    """Runs `python -m gradmap_hub` against one Hub; `run` waits, `start` does not."""

    def __init__(self, url: str, token: str | None, home: Path, text: Path) -> None:
        self.url = url
        self.home = home
        self.token = token
        self.quick = ["--samples", "4", "--seq-len", "32", "--eval-rows", "2", "--calibration", str(text)]
        self.patches = home / "patches"
        self.patches.mkdir(parents=True, exist_ok=True)
        (self.patches / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def environment(self, token: str | None, extra: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home / "hf"),
            "HOME": str(self.home),
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join([str(self.patches), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }
        if token is not None:
            kept["HF_TOKEN"] = token
        return kept | dict(extra)

    def start(
        self, *arguments: str | Path, token: str | None = None, cwd: Path | None = None, **extra: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gradmap_hub", *map(str, arguments)],
            env=self.environment(self.token if token is None else token or None, extra),
            cwd=cwd or self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *arguments: str | Path,
        token: str | None = None,
        cwd: Path | None = None,
        light: bool = False,
        **extra: str,
    ) -> Done:
        """`token=""` runs without any. `light`: of a command that should end before torch is imported; `torch` of what
        is returned says whether it did. What the client reads while it is imported needs a process of its own."""
        if sys.platform == "linux" and not any(name.startswith("HF_") for name in extra):
            kind = "light" if light else "full"
            if kind not in FORKS:
                FORKS[kind] = Forks(kind, self.environment(None, PLACEHOLDERS))
            environment = self.environment(self.token if token is None else token or None, extra)
            code, out, err, torch, used, seconds = FORKS[kind].run(
                "gradmap_hub", [*map(str, arguments)], environment, cwd or self.home, 180
            )
            return Done(code, out, err, seconds, torch, used)
        began = time.monotonic()
        process = self.start(*arguments, token=token, cwd=cwd, **extra)
        try:
            out, err = process.communicate(timeout=180)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return Done(process.returncode, out, err, time.monotonic() - began)

    def run_until(self, line: str, number: int, *arguments: str | Path, **extra: str) -> Done:
        """Send a signal as soon as a line on stderr contains `line`."""
        began = time.monotonic()
        process = self.start(*arguments, **extra)
        assert process.stderr is not None
        seen: list[str] = []
        for read in process.stderr:
            seen.append(read)
            if line in read:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
        return Done(process.returncode, out, "".join(seen) + err, time.monotonic() - began)


@dataclasses.dataclass
class World:
    """A Hub with a small model in it, and somebody who may write."""

    hub: LocalHub
    cli: Cli
    base: Path
    text: Path
    root: Path

    def repositories(self) -> dict[str, Any]:
        """Every repository of the Hub with its heads, visibility and settings."""
        folder = self.hub.root / "repos"
        return {
            path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())
            for path in sorted(folder.rglob("repo.json"))
        }

    def weights_asked_for(self, since: int = 0) -> list[Request]:
        """Downloads of weights, which begin with a HEAD request; a look at their header does not."""
        asked = (entry for entry in self.hub.requests[since:] if ".safetensors" in entry.path)
        return [entry for entry in asked if entry.method == "HEAD"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (a five-layer Llama with its tokenizer, licence and card) and `text.txt`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("assets")
    draw = random.Random(0)
    words = WORDS.split()
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(5, 11))).capitalize() + "." for _ in range(600)]
    (root / "text.txt").write_text("\n".join(lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(lines, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    base = root / "base"
    wrapped.save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer.encode("\n".join(lines)).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # A little training, so that a correction of the pruned model has something to correct.
    for rows in ids[: len(ids) // 256 * 256].view(-1, 8, 32)[:60]:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
    (base / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1, "max_length": 40}')
    (base / "LICENSE").write_text("You may do with it what you like.\n")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    return root


@pytest.fixture(scope="session")
def start_world(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    """Builds a Hub of its own; they are stopped at the end of the session."""
    running: list[LocalHub] = []

    def start(**settings: Any) -> World:
        root = tmp_path_factory.mktemp("world")
        hub = LocalHub(root / "hub", **settings)
        hub.start()
        running.append(hub)
        token = hub.add_user("ada", orgs=["club"])
        hub.seed("acme/tiny", assets / "base")
        cli = Cli(hub.url, token, root / "home", assets / "text.txt")
        return World(hub, cli, assets / "base", assets / "text.txt", root)

    yield start
    for hub in running:
        hub.stop()
    while FORKS:
        FORKS.popitem()[1].stop()


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    return start_world()


@pytest.fixture
def sums() -> Callable[[Path], dict[str, str]]:
    return sums_of


@pytest.fixture(scope="session")
def sums_of_folder() -> Callable[[Path], dict[str, str]]:
    """As `sums`, for fixtures that outlive a test."""
    return sums_of


@pytest.fixture(scope="session")
def variant(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the base model: `change(folder)` edits it, `config` values replace its own."""

    def build(
        *,
        config: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
        change: Callable[[Path], Any] | None = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("variant") / "model"
        shutil.copytree(assets / "base", folder)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
        for name in without:
            (folder / name).unlink()
        if change:
            change(folder)
        return folder

    return build
