"""Constrains an answer to JSON: which tokens may come next, by the library llguidance (the extra `json`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gradmap_hub.errors import GradmapError, MissingExtra

# Any white space is JSON, but a model may write nothing else for ever.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class ConstraintError(GradmapError):
    """A schema that cannot be used, or is too complex for the tokens so far."""


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


class JsonConstraints:
    """Makes the constraints of one model. Building it takes up to a second, for the trie of all tokens.

    `vocabulary`: the number of logits; `ends`: the ids that end an answer.

    Raises:
        MissingExtra: llguidance is not installed.
        ConstraintError: llguidance does not support the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtra("A response format in JSON", "json")
        import llguidance

        size = max(vocabulary, tokenizer.get_vocab_size())
        inside = sorted(token for token in ends if token < size)
        self._matcher = llguidance.LLMatcher
        try:
            self._tokens = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=inside or None)
        except Exception as error:  # of the library's Rust code, without a class of its own
            raise ConstraintError(f"llguidance does not support this tokenizer: {_line(str(error))}") from error

    def of(self, schema: Mapping[str, Any]) -> Constraint:
        """Return the constraint to a JSON schema.

        Raises:
            ConstraintError: the schema is invalid, or has what llguidance does not support.
        """
        try:
            overrides: Any = {"whitespace_pattern": _WHITE_SPACE}
            grammar = self._matcher.grammar_from_json_schema(dict(schema), overrides=overrides)
        except ValueError as error:
            raise ConstraintError(f"The JSON schema cannot be used: {_line(str(error))}") from error
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"The JSON schema cannot be used: {_line(matcher.get_error())}")
        return Constraint(matcher)


def _line(text: str) -> str:
    """Return the beginning of a message as one line."""
    return " ".join(text.split())[:300]
