"""Converts text to token ids and back: the tokenizer, the chat template and the end-of-text ids.

Standalone: `runtime` uses it, and it is copied into every Space folder, so that every engine prompts a model in the
same way. Started as a program, it is the process in which a LimitedRenderer renders chat templates.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Files read from a model folder besides graph or weights; several are optional.
TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END = "<|endoftext|>"
_GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
# The default special tokens of the tokenizer classes in transformers 4.57, used if the files of a model name none.
CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "BloomTokenizer": _LLAMA | {"pad_token": "<pad>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"},
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
# The tokenizer class of each model type (config.json), used if no file names one.
TYPE_CLASSES: dict[str, str] = {
    **dict.fromkeys(("arcee", "deepseek_v3", "llama", "ministral", "mistral", "mixtral", "phi3"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(
        ("exaone4", "gpt2", "gpt_neo", "gptj", "granite", "granitemoe", "olmo3", "opt", "starcoder2"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmo2", "olmoe", "stablelm"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "bloom": "BloomTokenizer",
    "phi": "CodeGenTokenizer",
}
# Characters shown of an error from a library or a template.
_MOST_SHOWN = 200

# Limit in CPU seconds for rendering a prompt, which takes milliseconds for a long conversation.
RENDER_SECONDS = 5
# Limit in bytes of address space; the process takes 0.2 GB, and a conversation a few times its own size.
RENDER_MEMORY = 1 << 30
# Limit in characters of a rendered prompt: more than a context of a million tokens holds.
_MOST_RENDERED = 4_000_000
# Wall-clock seconds per CPU second of rendering, on a machine that decoding keeps busy.
_SLOWDOWN = 4


class ModelError(Exception):
    """A model cannot be loaded or prompted; the message is shown to the user."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, because several are optional.

    Raises:
        ModelError: the file is not valid JSON, nested too deeply, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{path.name} is nested too deeply.") from None
    except ValueError as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} does not contain a JSON object.")
    return content


def first_line(error: BaseException | str) -> str:
    """The first line of a text or of an exception's message (or its type), shortened, without control characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(character if character.isprintable() else " " for character in line[:_MOST_SHOWN])


def is_tokenizer_failure(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: a plain Exception, or a PanicException, which is a BaseException."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def special_token(value: object) -> str | None:
    """A special token in a tokenizer configuration, given as text or as {"content": text, ...}; None otherwise."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, as transformers finds them: tokenizer_config.json overrides the defaults of the
    tokenizer's class, and special_tokens_map.json overrides both unless the first file has an added_tokens_decoder."""
    config = read_json(folder / "config.json")
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    named = named or TYPE_CLASSES.get(str(config.get("model_type")))
    stated: dict[str, Any] = dict(CLASS_TOKENS.get(str(named).removesuffix("Fast"), {}))
    stated |= {name: tokenizer_config[name] for name in SPECIAL_TOKENS if name in tokenizer_config}
    if "added_tokens_decoder" not in tokenizer_config:
        saved = read_json(folder / "special_tokens_map.json")
        stated |= {name: saved[name] for name in SPECIAL_TOKENS if name in saved}
    return {name: token for name, value in stated.items() if (token := special_token(value)) is not None}


def end_ids(folder: Path, tokenizer: Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    """The ids that end an answer: eos_token_id of generation_config.json, else of config.json, else the eos_token."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise ModelError(f"{name}: eos_token_id must be a token id or a list of them.")
        if ids:
            return frozenset(ids)
    found = tokenizer.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    return frozenset() if found is None else frozenset({found})


def chat_template_of(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The (default) chat template, from chat_template.jinja, else from tokenizer_config.json; None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{file.name} is not UTF-8 text: {error}") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, Mapping) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    elif isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is printed."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages ({"role", "content"}) with a chat template, up to the start of the answer.

    The template is untrusted, so it runs in jinja2's sandbox: no access to Python attributes, no changes to its
    arguments.

    Args:
        tokens: Special tokens by name, such as bos_token.
        variables: Further variables of the template, such as add_generation_prompt.

    Raises:
        ModelError: the template fails.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which changes the prompt. The arguments are transformers'.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            **{"add_generation_prompt": True, "tools": None, "documents": None, **(variables or {}), **tokens},
        )
    # A template is a program and may raise anything, such as a security or type error.
    except Exception as error:
        raise ModelError(f"The model's chat template failed: {first_line(error)}") from error


class LimitedRenderer:
    """Renders as `render_chat` does, in a process with limits of time and memory. Threads take turns.

    A template is an untrusted program: one message can make it loop for ever, or build a text that fills the memory.
    Neither can be stopped from within the process. The process starts with the first call, and again after it was ended
    at a limit; it ends with this object, or with the process that started it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def __call__(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of messages ({"role", "content"}), up to the start of the answer.

        Raises:
            ModelError: the template fails, or exceeds a limit of time, memory or length.
        """
        turns = [dict(turn) for turn in messages]
        task = json.dumps([template, turns, dict(tokens), dict(variables or {})])
        if os.getpid() != self._process:  # a fork, as on ZeroGPU: the parent keeps lock and worker
            if self._finalizer is not None:
                self._finalizer.detach()
            self.__init__()
        with self._lock:
            line = self._ask(task.encode() + b"\n")
        try:
            answer = json.loads(line)
        except ValueError:  # it was ended before it answered
            raise ModelError(
                f"The model's chat template failed: it takes more than {RENDER_SECONDS} seconds or "
                f"{RENDER_MEMORY / 1e9:.1f} GB for these messages, or its process was ended."
            ) from None
        if "text" in answer:
            return answer["text"]
        raise ModelError(answer["error"])

    def _ask(self, task: bytes) -> bytes:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            if self._finalizer is not None:
                self._finalizer.detach()
            try:
                worker = self._worker = _start()
            except OSError as error:  # no more processes or files
                raise ModelError(f"The model's chat template cannot be rendered: {error.strerror}") from error
            self._finalizer = weakref.finalize(self, _end, worker)
        assert worker.stdin is not None and worker.stdout is not None
        watch = threading.Timer(_SLOWDOWN * RENDER_SECONDS, worker.kill)
        watch.daemon = True
        watch.start()
        line = b""
        try:
            worker.stdin.write(task)
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:  # it died before it read the task
            pass
        finally:
            watch.cancel()
            if not line.endswith(b"\n"):  # after Ctrl-C too: the answer would be taken for that of the next task
                _end(worker)
        return line


def _start() -> subprocess.Popen[bytes]:
    # -P: this file's folder is not searched for modules. No shell, and nothing of the caller's on the command line.
    return subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not yet written
                continue


def _limit_memory() -> None:
    """Let allocations beyond RENDER_MEMORY fail, where the platform can (macOS cannot)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (RENDER_MEMORY, RENDER_MEMORY))
    except (ImportError, OSError, ValueError):
        return


def _limit_time(seconds: int) -> None:
    """Let the system end this process after `seconds` of CPU time, even if nobody waits for it; 0 removes the limit."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _render_tasks() -> None:
    """The process of a LimitedRenderer: a task per line of standard input, an answer per line of standard output, both
    JSON. It ends when its input does, or at a limit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _limit_memory()
    for line in sys.stdin:
        task = json.loads(line)
        _limit_time(RENDER_SECONDS)
        try:
            text = render_chat(*task)
            if len(text) > _MOST_RENDERED:
                raise ModelError(
                    f"The model's chat template failed: it writes more than {_MOST_RENDERED:,} characters for these "
                    "messages."
                )
            written = json.dumps({"text": text})
        except ModelError as error:
            written = json.dumps({"error": str(error)})
        _limit_time(0)
        print(written, flush=True)


@dataclass(frozen=True)
class TextCodec:
    """Encodes and decodes text for one model. `tokens`: special tokens by name; `ends`: the ids that end an answer."""

    tokenizer: Tokenizer
    chat_template: str | None
    tokens: Mapping[str, str]
    ends: frozenset[int]
    render: LimitedRenderer = field(default_factory=LimitedRenderer)

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError("tokenizer.json is missing.")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except BaseException as error:
            if not is_tokenizer_failure(error):
                raise
            raise ModelError(f"tokenizer.json could not be read: {first_line(error)}") from error
        return cls.with_tokenizer(folder, tokenizer)

    @classmethod
    def with_tokenizer(cls, folder: Path, tokenizer: Tokenizer) -> TextCodec:
        # A stored tokenizer may truncate or pad; prompts must stay unchanged.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        tokens = special_tokens(folder, config)
        return cls(
            tokenizer=tokenizer,
            chat_template=chat_template_of(folder, config),
            tokens=tokens,
            ends=end_ids(folder, tokenizer, tokens),
        )

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt as one user message, or as plain text if the model has no chat template."""
        if self.chat_template is None:
            return self.encode_text(prompt)
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_text(self, text: str, *, special: bool = True) -> list[int]:
        return self._ids(text, add_special_tokens=special)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encode_rendered(self.rendered(messages))

    def rendered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        if self.chat_template is None:
            raise ModelError("This model has no chat template.")
        return self.render(self.chat_template, messages, self.tokens, variables)

    def encode_rendered(self, text: str) -> list[int]:
        # The template has already written the special tokens.
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, such as from a byte that is not UTF-8
            raise ModelError("This prompt is not valid Unicode text.") from None
        try:
            # A batch of one: unlike `encode`, it releases the GIL, so a server answers other requests meanwhile.
            ids = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        except BaseException as error:
            if not is_tokenizer_failure(error):
                raise
            raise ModelError(f"tokenizer.json fails on this prompt: {first_line(error)}") from error
        if not ids:
            raise ModelError("This prompt has no tokens.")
        return ids

    def stream(self) -> Callable[[int], str]:
        """Return a function that takes ids one by one and returns the text that each completes."""
        stream = DecodeStream(skip_special_tokens=True)

        def next_piece(token: int) -> str:
            nonlocal stream
            for _ in range(2):
                try:
                    return stream.step(self.tokenizer, token) or ""
                except BaseException as error:
                    if not is_tokenizer_failure(error):
                        raise
                    # tokenizers fails on some malformed byte sequences ("Invalid prefix encountered"), which a damaged
                    # model may generate; continue with a new stream.
                    stream = DecodeStream(skip_special_tokens=True)
            return ""  # a token that cannot be decoded at all

        return next_piece


if __name__ == "__main__":
    _render_tasks()
