"""The bytes of single tokens. A token may end within a character, so its text alone is not always valid UTF-8."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # sentencepiece's mark for a space


def _byte_alphabet() -> dict[str, int]:
    """Return the printable characters with which byte-level tokenizers write bytes, as GPT-2 defines them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenBytes:
    """The bytes that each token of a tokenizer stands for. `special`: the tokens that an answer does not show."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: each.content.encode() for token, each in added.items()}
        self.special = frozenset(token for token, each in added.items() if each.special)
        decoder: Any = tokenizer.decoder
        self._byte_level = decoder is not None and "ByteLevel" in _kinds(json.loads(decoder.__getstate__()))

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; none for an id that the tokenizer does not have."""
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in _ALPHABET for character in piece):
            return bytes(_ALPHABET[character] for character in piece)
        found = _BYTE.fullmatch(piece)
        if found:
            return bytes([int(found[1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """Return the type of a decoder, and those of its parts if it is a sequence of decoders."""
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", ())))
