"""Converts text to token ids and back: the tokenizer, the chat template and the end-of-text ids.

Standalone: `runtime` uses it, and it is copied into every Space folder, so that every engine prompts a model in the
same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Files read from a model folder besides graph or weights; the last ones are optional.
TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


class ModelError(Exception):
    """A model cannot be loaded or prompted; the message is shown to the user."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, because several are optional.

    Raises:
        ModelError: the file is not valid JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} does not contain a JSON object.")
    return content


def special_token(value: object) -> str | None:
    """A special token in a tokenizer configuration, given as text or as {"content": text, ...}; None otherwise."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def end_ids(folder: Path, tokenizer: Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    """The ids that end an answer: those that `generate` uses, else the tokenizer's own end token."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return frozenset({value})
        if isinstance(value, list) and value:
            return frozenset(int(item) for item in value)
    found = tokenizer.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    return frozenset() if found is None else frozenset({found})


def chat_template_of(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template, from its file or else from tokenizer_config.json (a text, or a list of named ones)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is printed."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """Render messages ({"role", "content"}) with a chat template, up to the start of the answer.

    The template is untrusted, so it runs in jinja2's sandbox: no access to Python attributes, no changes to its
    arguments.

    Args:
        tokens: Special tokens by name, such as bos_token.

    Raises:
        ModelError: the template fails.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None) -> str:
        # Jinja's own filter escapes HTML characters, which changes the prompt.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **tokens,
        )
    # A template is a program and may raise anything, such as a security or type error.
    except Exception as error:
        raise ModelError(f"The model's chat template failed: {error}") from error


@dataclass(frozen=True)
class TextCodec:
    """Encodes and decodes text for one model. `ends`: the ids that end an answer."""

    tokenizer: Tokenizer
    chat_template: str | None
    tokens: Mapping[str, str]
    ends: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError("tokenizer.json is missing.")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"tokenizer.json could not be read: {error}") from error
        return cls.with_tokenizer(folder, tokenizer)

    @classmethod
    def with_tokenizer(cls, folder: Path, tokenizer: Tokenizer) -> TextCodec:
        # A stored tokenizer may truncate or pad; prompts must stay unchanged.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: token for name in names if (token := special_token(config.get(name))) is not None}
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

    def encode_text(self, text: str) -> list[int]:
        return self._some(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.chat_template is None:
            raise ModelError("This model has no chat template.")
        # The template has already written the special tokens.
        text = render_chat(self.chat_template, messages, self.tokens)
        return self._some(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _some(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ModelError("This prompt has no tokens.")
        return ids

    def stream(self) -> Callable[[int], str]:
        """A function that takes ids one by one and returns the text that each completes."""
        stream = DecodeStream(skip_special_tokens=True)

        def next_piece(token: int) -> str:
            nonlocal stream
            try:
                return stream.step(self.tokenizer, token) or ""
            except Exception:
                # tokenizers fails on some malformed byte sequences ("Invalid prefix encountered"), which a damaged
                # model may generate; continue with a new stream.
                stream = DecodeStream(skip_special_tokens=True)
                return stream.step(self.tokenizer, token) or ""

        return next_piece
