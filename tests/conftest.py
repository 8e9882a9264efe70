"""Tiny real models of every supported family, a real tokenizer, a model folder and a text, all made here without data.

Imports of torch and transformers stand inside the builders: tests of the Hub and of the Space do not pay for them.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# `benchmarks` is not installed. The root must not go on sys.path for it: gradio would import our spaces/ as `spaces`.
_BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
_spec = importlib.util.spec_from_file_location(
    "benchmarks", _BENCHMARKS / "__init__.py", submodule_search_locations=[str(_BENCHMARKS)]
)
assert _spec is not None
sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)
if "forks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("forks", Path(__file__).with_name("forks.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules["forks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["forks"])

# As the command line sets it, for the same reason.
gc.set_threshold(100_000, 30, 30)
# Two workers with a thread for each core wait for each other's threads; the subprocesses of both inherit this.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
LAYERS = 5
HIDDEN = 64
FEED_FORWARD = 96
WINDOW = 12
VOCABULARY = 300
# Neither a prefix nor a suffix nor a window: what is renumbered wrongly shows.
REMOVED = (1, 3)

_PLACES = ("river", "harbour", "mill", "orchard", "station", "library", "valley", "bridge", "market", "tower")
_THINGS = ("lantern", "ledger", "kite", "violin", "barrel", "compass", "letter", "ladder", "basket", "clock")
_VERBS = ("carried", "mended", "found", "sold", "painted", "counted", "hid", "borrowed", "weighed", "described")
_NAMES = ("Ada", "Bruno", "Chidi", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "June")


def make_text(characters: int, seed: int = 0) -> str:
    """Sentences with numbers in them, so that no row of tokens is likely to occur twice."""
    draw = random.Random(seed)
    sentences: list[str] = []
    size = 0
    while size < characters:
        sentence = (
            f"{draw.choice(_NAMES)} {draw.choice(_VERBS)} the {draw.choice(_THINGS)} at the {draw.choice(_PLACES)}"
            f" on day {draw.randrange(10_000)}, and {draw.choice(_NAMES)} {draw.choice(_VERBS)} {draw.randrange(1_000)}"
            f" of them near the {draw.choice(_PLACES)}.\n"
        )
        sentences.append(sentence)
        size += len(sentence)
    return "".join(sentences)


def build_model(family: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """A random causal LM of five layers in float32, made livelier than the default initialisation so that every layer
    and every norm leaves a mark on the logits. Sliding windows are 12 tokens."""
    import torch
    import transformers

    torch.set_num_threads(1)  # models this small only wait for each other's threads
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    own: dict[str, dict[str, Any]] = {
        "gemma": {"head_dim": 16},
        "llama": {},
        "mistral": {"sliding_window": WINDOW, "head_dim": 16},
        "phi3": {"sliding_window": WINDOW},
        # Explicit types that no rule derives from the index ...
        "qwen2": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
        },
        # ... and types that transformers derives: the first two full, the rest sliding.
        "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "head_dim": 16},
    }
    config_class = {
        "gemma": transformers.GemmaConfig,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "phi3": transformers.Phi3Config,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[family]
    torch.manual_seed(seed)
    config = config_class(**{**common, **own[family], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norm gains (and biases): ones (zeros) would hide a swapped layer
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.mul_(0.5)
    model.generation_config.eos_token_id = None
    return model


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on generated sentences, as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([make_text(20_000, seed=7)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def build_folder(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A checkpoint as the Hub holds one: config, safetensors, tokenizer, generation config, licence."""
    model = build_model(family, **overrides)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "LICENSE").write_text("Apache License, Version 2.0\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def xet_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where hf_xet remembers uploads, and how long it waits between tries; it reads both when it is first used."""
    os.environ |= {"HF_XET_CACHE": str(tmp_path_factory.mktemp("xet")), "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}


@pytest.fixture(scope="session", autouse=True)
def exports_in_forks() -> Iterator[None]:
    """What exports a model skips the ten seconds of imports; those of commands that `Cli.start` starts do not."""
    from gradmap_hub.models.transformers_compat import has_5

    if sys.platform != "linux" or has_5():  # with 5, exports have an environment of their own
        yield
        return
    from forks import Forks, use_for_exports

    from gradmap_hub.exporters.processes import worker_environment

    forks = Forks("export", worker_environment())
    os.environ["TEST_EXPORTS"] = str(forks.python)
    use_for_exports(str(forks.python))
    yield
    forks.stop()


@pytest.fixture
def point_client_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Does what HF_ENDPOINT does when it is set before huggingface_hub is imported."""
    from huggingface_hub import constants, file_download

    def point(url: str) -> None:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # up to 0.36

    return point


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Any]:
    """Builds a tiny model: `model_of(family, tied=..., seed=..., **config)`."""
    return build_model


@pytest.fixture(scope="session")
def folder_of() -> Callable[..., Path]:
    """Writes a tiny model folder: `folder_of(path, family, **config)`."""
    return build_folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def _tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def tiny_folder(_tiny_original: Path, tmp_path: Path) -> Path:
    """A tiny Llama folder of this test's own; it may be damaged."""
    import shutil

    return Path(shutil.copytree(_tiny_original, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 100 kB of generated sentences."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(make_text(100_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_of() -> Callable[..., str]:
    """Generated text: `text_of(characters, seed)`."""
    return make_text


@pytest.fixture(scope="session")
def task_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six documents of every task of lm-evaluation-harness that is known here, in its field names."""
    from gradmap_hub.evaluation.tasks import TASKS

    draw, folder = random.Random(5), tmp_path_factory.mktemp("tasks")
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for number in range(6):
        sentences = make_text(900, seed=100 + number).splitlines()
        words = draw.sample(_THINGS, 4)
        asked = f"What did {draw.choice(_NAMES)} find on day {number}"
        choices = {"text": [f"a {word} or {number}" for word in words], "label": ["A", "B", "C", "D"]}
        answer = draw.choice("ABCD")
        made["boolq"].append({"question": asked, "passage": sentences[0], "label": draw.randrange(2)})
        made["piqa"].append({"goal": asked, "sol1": words[0], "sol2": f"the old {words[1]}", "label": number % 2})
        made["hellaswag"].append(
            {
                "activity_label": "Mending", "ctx_a": sentences[1], "ctx_b": "then somebody",
                "endings": [f"sold the {word}." for word in words], "label": str(draw.randrange(4)),
            }
        )  # fmt: skip
        made["winogrande"].append(
            {
                "sentence": f"{sentences[2]} The _ was {draw.choice(_VERBS)}.", "option1": words[0],
                "option2": words[1], "answer": draw.choice("12"),
            }
        )  # fmt: skip
        for name in ("arc_easy", "arc_challenge"):
            made[name].append({"question": f"{asked}, {name}?", "choices": choices, "answerKey": answer})
        made["openbookqa"].append({"question_stem": asked, "choices": choices, "answerKey": answer})
        made["lambada_openai"].append({"text": f"{sentences[3]} {words[2]}"})
        made["wikitext"].append({"page": " ".join(sentences[: number + 1])})
    for name, rows in made.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / TASKS[name].file).write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., Any]:
    """Seeded token ids: `random_rows(rows, tokens, seed)`."""

    def draw(rows: int, tokens: int, seed: int = 0) -> Any:
        import torch

        return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def decoder_of() -> Callable[..., Any]:
    """A Decoder over a model for rows of so many tokens."""

    def make(model: Any, tokens: int) -> Any:
        from gradmap_hub.models.decoder import Decoder
        from gradmap_hub.models.support import architecture_of

        return Decoder(model, architecture_of(model.config.to_dict()), tokens)

    return make


# Plain transformers, no code of ours: reads each folder, leaves the logits in it, and saves it again in its own way.
_OTHER = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
task = json.load(sys.stdin)
torch.set_num_threads(1)
for folder in task["folders"]:
    capped = getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if capped else {}  # 4.57 would not cap
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    assert not wrong, (folder, wrong)
    with torch.no_grad():
        torch.save(model.eval()(torch.tensor(task["ids"]), use_cache=False).logits[0].float(), folder + "/logits.pt")
    model.save_pretrained(folder + "/again")
    if task["text"]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(task["text"])
        assert set(tokens) == {"input_ids", "attention_mask"}, set(tokens)
        torch.save(torch.tensor(tokens["input_ids"]), folder + "/tokens.pt")
        tokenizer.save_pretrained(folder + "/again")
"""


@pytest.fixture(scope="session")
def other_transformers() -> Callable[..., None]:
    """Reads folders with the transformers of the other lane (.venv, .venv5): `other_transformers(folders, ids, text)`.
    Each then has logits.pt, with a text tokens.pt, and the folder `again`."""
    import subprocess

    from gradmap_hub.models.transformers_compat import has_5

    lane = ".venv" if has_5() else ".venv5"
    python = Path(__file__).parents[1] / lane / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"the other lane is not installed: no {lane} (`make install` and `make install-5`)")

    def read(folders: Sequence[Path], ids: Any, text: str = "") -> None:
        task = {"folders": [str(folder) for folder in folders], "ids": ids.tolist(), "text": text}
        done = subprocess.run([python, "-c", _OTHER], input=json.dumps(task), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    return read


@pytest.fixture(scope="session")
def prune_copy() -> Callable[..., Any]:
    """A copy of a model without some of its layers; the model itself is left alone."""

    def prune(model: Any, removed: Sequence[int] = REMOVED) -> Any:
        import copy

        from gradmap_hub.models.support import architecture_of
        from gradmap_hub.pruning.removal import remove_layers

        pruned = copy.deepcopy(model)
        remove_layers(pruned, architecture_of(pruned.config.to_dict()), removed)
        return pruned

    return prune


CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SENTENCES = [
    "The capital of France is Paris, and the river through it is the Seine.",
    "Gravity pulls things together; that is why an apple falls to the ground.",
    "A paper clip holds sheets of paper, opens a lock and marks a page.",
]

TINY_CONTEXT = 1024


@dataclass(frozen=True)
class Tiny:
    """Two checkpoints (three layers and two) and their ONNX exports."""

    original: Path
    pruned: Path
    original_onnx: Path
    pruned_onnx: Path


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
        "bos_token": {"content": "<s>", "special": True, "__type": "AddedToken"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def export_tiny() -> Callable[..., None]:
    """Writes a tiny Llama with tokenizer and chat template into one folder, and its ONNX export into another."""

    def export(checkpoint: Path, onnx: Path, layers: int, *, endless: bool = False, hidden: int = 64) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from gradmap_hub.models.transformers_compat import has_5

        checkpoint.mkdir()
        vocabulary = _save_tokenizer(checkpoint)
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=TINY_CONTEXT,
                initializer_range=0.4,  # Wide, so that the likeliest token is clear of the next.
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=True,
            )
        )
        if endless:  # the end of the text is never the likeliest token
            with torch.no_grad():
                model.model.embed_tokens.weight[2] = 0
        model.save_pretrained(checkpoint)
        if has_5():
            from gradmap_hub.exporters import environment
            from gradmap_hub.exporters.onnx import export_onnx
            from gradmap_hub.models.safetensors_files import clean_config
            from gradmap_hub.progress import SilentReporter

            clean_config(checkpoint / "config.json")
            environment.prepare(SilentReporter())
            export_onnx(checkpoint, onnx)
            for path in checkpoint.iterdir():  # as Optimum does by itself
                if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                    shutil.copyfile(path, onnx / path.name)
            return
        from optimum.exporters.onnx import main_export

        main_export(
            str(checkpoint),
            output=str(onnx),
            task="text-generation-with-past",
            local_files_only=True,
            do_validation=False,
            dtype="fp32",
            device="cpu",
        )

    return export


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, export_tiny: Callable[..., None]) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    tiny = Tiny(root / "original", root / "pruned", root / "original-onnx", root / "pruned-onnx")
    export_tiny(tiny.original, tiny.original_onnx, 3)
    export_tiny(tiny.pruned, tiny.pruned_onnx, 2)
    return tiny


# -- the tables of docs/reliability.md --------------------------------------------------------------------------------


# Fixtures that export, start apps, or run commands that are killed, by folder: the tests that want one are `long`.
LONG_FIXTURES = {
    "cli": {"full", "quantised", "killed", "large"},
    "exporters": {"shop"},
    "spaces": {"running", "slow_app"},
}
# The rest of the long files, longest first.
LONG_FILES = (
    "test_push.py",
    "test_errors.py",
    "test_formats.py",
    "test_evaluate.py",
    "test_sweep.py",
    "test_browser.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The push of the real model first: it takes longest, and another worker has the rest meanwhile. Then the longest
    files, so that no worker is left with one of them at the end."""

    def turn(item: pytest.Item) -> int:
        if item.get_closest_marker("real") is not None:
            return 0
        return 1 + (LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))

    for item in items:
        if LONG_FIXTURES.get(item.path.parent.name, set()).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)
    items.sort(key=turn)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Prints what `record_property("reliability", (table, row, column, outcome))` told with -v; with RELIABILITY=FILE
    writes it there, between the two marks of its table, if all tests passed. A run of some of the tests of a file
    leaves the cells alone that it did not measure; only a run of all of them knows which rows are no more."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "reliability":
                table, row, column, outcome = value
                found.setdefault(table, {}).setdefault(row, {})[column] = outcome
    # Not from what was deselected: with xdist only the workers know that.
    options = config.option
    partial = bool(options.keyword or options.markexpr or options.deselect or getattr(options, "lf", False)) or any(
        "::" in argument for argument in config.args
    )
    file = os.environ.get("RELIABILITY")
    text = Path(file).read_text(encoding="utf-8") if file else ""
    for table, rows in found.items():
        if config.get_verbosity() > 0:
            terminalreporter.write_line("")
            terminalreporter.write_line(table)
            for line in markdown_table(rows):
                terminalreporter.write_line(line)
        before, start, after = text.partition(f"<!-- {table} -->\n")
        if start:
            old, end, rest = after.partition("<!-- end -->")
            kept = merged(table_cells(old), rows) if partial else rows
            text = before + start + "\n".join(["", *markdown_table(kept), ""]) + "\n" + end + rest
    if file and exitstatus == 0:
        Path(file).write_text(text, encoding="utf-8")


def markdown_table(rows: dict[str, dict[str, str]]) -> list[str]:
    """{row: {column: cell}} as Markdown; `-` where there is no cell."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cells.get(column, '-') for column in columns)} |" for row, cells in rows.items()]
    return lines


def table_cells(text: str) -> dict[str, dict[str, str]]:
    """What `markdown_table` made the lines of."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    columns = lines[0] if lines else []
    return {
        row: {column: cell for column, cell in zip(columns, cells, strict=True) if cell != "-"}
        for row, *cells in lines[1:]
    }


def merged(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The cells of both, the new ones before the old, in the order of the old."""
    return {row: {**old.get(row, {}), **new.get(row, {})} for row in {**old, **new}}
