"""Constrains an answer to JSON, a pattern, a grammar or calls of tools: which tokens may come next, by the library
llguidance (the extra `json`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gradmap_hub.errors import GradmapError, MissingExtra
from gradmap_hub.runtime.tool_formats import ToolFormat, grammar_of

# Any white space is JSON, but a model may write nothing else for ever.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class ConstraintError(GradmapError):
    """A schema that cannot be used, or is too complex for the tokens so far."""


@dataclass(frozen=True)
class Regex:
    """The whole answer matches a regular expression."""

    pattern: str


@dataclass(frozen=True)
class Grammar:
    """The answer is of a context-free grammar: llguidance's variant of Lark, or llama.cpp's GBNF."""

    text: str


@dataclass(frozen=True)
class Calls:
    """The answer calls functions. `functions`: name to the JSON schema of the arguments; `parallel`: there may be
    several calls; `answer`: the JSON schema of an answer without calls, None: there must be one."""

    row: ToolFormat
    functions: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    answer: Mapping[str, Any] | None = None


# A mapping is a JSON schema.
Wanted = Mapping[str, Any] | Regex | Grammar | Calls


class Constraint:
    """The state of one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> np.ndarray:
        """Return which of the first `size` token ids may come next: (size,) bool, at least one of them.

        Raises:
            ConstraintError: the schema is too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(packed, count=size, bitorder="little").astype(bool)
        if not allowed.any():
            raise ConstraintError("The response format cannot be completed with the tokens of this model.")
        return allowed

    def accept(self, token: int) -> None:
        """Append a token, one of those allowed.

        Raises:
            ConstraintError: the schema is too complex.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"The response format cannot be used: {_line(self._matcher.get_error())}")


class Constraints:
    """Makes the constraints of one model. Building it takes up to a second, for the trie of all tokens.

    `vocabulary`: the number of logits; `ends`: the ids that end an answer.

    Raises:
        MissingExtra: llguidance is not installed.
        ConstraintError: llguidance does not support the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtra("An answer of a given form", "json")
        import llguidance

        size = max(vocabulary, tokenizer.get_vocab_size())
        inside = sorted(token for token in ends if token < size)
        self._matcher = llguidance.LLMatcher
        self._to_lark = llguidance.grammar_from
        added = tokenizer.get_added_tokens_decoder()
        try:
            self._tokens = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=inside or None)
        except Exception as error:  # of the library's Rust code, without a class of its own
            raise ConstraintError(f"llguidance does not support this tokenizer: {_line(str(error))}") from error

        self._special = {
            each.content: token
            for token, each in added.items()
            if token < size and self._tokens.is_special_token(token)
        }

    def of(self, wanted: Wanted) -> Constraint:
        """Return a constraint of one answer.

        Raises:
            ConstraintError: what is wanted is invalid, or has what llguidance does not support.
        """
        try:
            named, grammar = self._grammar(wanted)
        except ValueError as error:  # of llguidance's Python code, such as for GBNF
            raise ConstraintError(f"What the answer must be cannot be used: {_line(str(error))}") from error
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{named} cannot be used: {_line(matcher.get_error())}")
        return Constraint(matcher)

    def _grammar(self, wanted: Wanted) -> tuple[str, str]:
        """Return what an error calls it, and the grammar as llguidance takes it."""
        options: Any = {"whitespace_pattern": _WHITE_SPACE}
        if isinstance(wanted, Regex):
            return "The pattern", self._matcher.grammar_from_regex(wanted.pattern)
        if isinstance(wanted, Grammar):
            kind = "gbnf" if "::=" in wanted.text else "lark"
            return "The grammar", self._to_lark(kind, wanted.text)
        if isinstance(wanted, Calls):
            lark = grammar_of(
                wanted.row, wanted.functions, self._special, parallel=wanted.parallel, answer=wanted.answer,
                options=options,
            )  # fmt: skip
            return "The parameters of a function", self._matcher.grammar_from_lark(lark)
        return "The JSON schema", self._matcher.grammar_from_json_schema(dict(wanted), overrides=options)


def _line(text: str) -> str:
    """Return the beginning of a message as one line."""
    return " ".join(text.split())[:300]
