"""A tiny real Llama, exported to ONNX and served over real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SENTENCES = [
    "The capital of France is Paris, and the river through it is the Seine.",
    "Gravity pulls things together; that is why an apple falls to the ground.",
    "A paper clip holds sheets of paper, opens a lock and marks a page.",
]
CONTEXT = 1024
NAME = "someone/tiny"
# The command as it is installed, also while it is being written: `serve` may not be registered yet.
COMMAND = """
from gradmap_hub import cli, cli_serve
if "serve" not in {command.name or command.callback.__name__ for command in cli.app.registered_commands}:
    cli_serve.register(cli.app)
cli.main()
"""


def _save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `push` makes one, as far as the runtime looks. Greedy answers never end by themselves."""
    import torch
    from optimum.exporters.onnx import main_export
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("serving")
    source, target = root / "checkpoint", root / "served"
    source.mkdir()
    vocabulary = _save_tokenizer(source)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.4,  # Wide, so that the likeliest token is clear of the next.
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = 0  # The end of the text is never the likeliest token.
    model.save_pretrained(source)
    main_export(
        str(source),
        output=str(target),
        task="text-generation-with-past",
        local_files_only=True,
        do_validation=False,
        dtype="fp32",
        device="cpu",
    )
    return target


@pytest.fixture(scope="session")
def model(tiny_onnx: Path) -> Any:
    from gradmap_hub import runtime

    return runtime.load(tiny_onnx, threads=1)


class Paced:
    """The real model, each step of which takes at least so many seconds: tests of waiting must know how long."""

    def __init__(self, model: Any, seconds: float) -> None:
        self._model = model
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def start(self, *arguments: Any, **options: Any) -> Any:
        return _PacedGeneration(self._model.start(*arguments, **options), self._seconds)


class _PacedGeneration:
    def __init__(self, generation: Any, seconds: float) -> None:
        self._generation = generation
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def advance(self) -> str:
        time.sleep(self._seconds)
        return self._generation.advance()


@contextmanager
def serving(model: Any, *, pace: float = 0.0, **settings: Any) -> Iterator[Any]:
    """A running server for a model, with its address as `url`."""
    from gradmap_hub.serving.server import Server
    from gradmap_hub.serving.settings import Settings

    options: dict[str, Any] = {"port": 0, "name": NAME} | settings
    with Server(Paced(model, pace) if pace else model, Settings(**options)) as server:
        yield server


def alone(model: Any, prompt_ids: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
    """What the engine says without any server."""
    generation = model.start(prompt_ids, max_tokens=max_tokens, stop=tuple(stop))
    while generation.finish_reason is None:
        generation.advance()
    text = generation.text
    generation.close()
    return text


def events(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events; [DONE] stays a string."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def is_refusal(body: bytes) -> bool:
    """Whether an answer is an error as the OpenAI API words it."""
    error = json.loads(body)["error"]
    return (
        set(error) == {"message", "type", "param", "code"}
        and all(isinstance(error[name], str) and error[name] for name in ("message", "type"))
        and all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    )


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@contextmanager
def command(folder: Path, *options: str) -> Iterator[Any]:
    """`gradmap-hub serve` as a process; yields it and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", str(folder), "--port", "0", "--name", NAME, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.communicate(timeout=20)[1]
        yield SimpleNamespace(process=process, url=url)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def served(model: Any) -> Iterator[Any]:
    """One server with the default limits, for tests that only ask it something."""
    with serving(model) as server:
        yield server


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above; a conftest.py cannot be imported from under --import-mode=importlib."""
    return SimpleNamespace(
        serving=serving, alone=alone, events=events, is_refusal=is_refusal, wait_until=wait_until, command=command,
        name=NAME, context=CONTEXT,
    )  # fmt: skip
