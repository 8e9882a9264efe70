"""Constrains an answer to a JSON schema, a regular expression, a grammar or tool calls.

The library llguidance (extra `json`) computes which tokens may come next.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gradmap_hub.errors import GradmapError, MissingExtra
from gradmap_hub.runtime.tool_formats import ToolFormat, grammar_of

# JSON allows any amount of white space, which a model may generate for ever.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class ConstraintError(GradmapError):
    """A constraint that is invalid or not supported, or too complex for the answer so far."""


@dataclass(frozen=True)
class Regex:
    """The whole answer matches a regular expression."""

    pattern: str


@dataclass(frozen=True)
class Grammar:
    """The answer follows a context-free grammar: llama.cpp's GBNF (if it contains "::="), or llguidance's Lark."""

    text: str


@dataclass(frozen=True)
class Calls:
    """The answer calls functions.

    `row`: how the model writes calls; `functions`: function name to the JSON schema of its arguments; `parallel`:
    whether several calls are allowed; `answer`: the JSON schema of an answer without calls; None: the answer must have
    a call.
    """

    row: ToolFormat
    functions: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    answer: Mapping[str, Any] | None = None


# A mapping is a JSON schema.
Wanted = Mapping[str, Any] | Regex | Grammar | Calls


class Constraint:
    """The constraint of one answer, in its state after the tokens so far."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> np.ndarray:
        """Return which of the first `size` token ids may come next: (size,) bool, at least one True.

        Raises:
            ConstraintError: the constraint is too complex, or no token of the model can continue the answer.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(packed, count=size, bitorder="little").astype(bool)
        if not allowed.any():
            raise ConstraintError("The response format cannot be completed with the tokens of this model.")
        return allowed

    def accept(self, token: int) -> None:
        """Append a token, which must be one of those allowed.

        Raises:
            ConstraintError: the constraint is too complex.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that no token may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"The response format cannot be used: {_line(self._matcher.get_error())}")


class Constraints:
    """Makes the constraints of one model. Building it takes up to a second, for a trie of all tokens.

    `tokenizer`: of the model; `vocabulary`: number of logits; `ends`: token ids that end an answer.

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
        """Return a constraint for one answer. `wanted`: a JSON schema, `Regex`, `Grammar` or `Calls`.

        Raises:
            ConstraintError: `wanted` is invalid, or llguidance does not support it.
        """
        try:
            named, grammar = self._grammar(wanted)
        except ValueError as error:  # of llguidance's Python code, such as for GBNF
            raise ConstraintError(f"The requested form of the answer cannot be used: {_line(str(error))}") from error
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{named} cannot be used: {_line(matcher.get_error())}")
        return Constraint(matcher)

    def _grammar(self, wanted: Wanted) -> tuple[str, str]:
        """Return the name of a constraint for error messages, and its grammar in llguidance's format."""
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
