"""The bytes of single tokens, which together are the text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gradmap_hub.runtime.token_text import TokenBytes

TEXTS = ["Plain words, twice: words.", "Grüße, 你好 🦊!", "\x00\x7f\n\t  two  spaces", ""]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_make_the_text(text: str, sequence: bool) -> None:
    tokenizer = byte_level()
    if sequence:
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    of = TokenBytes(tokenizer)
    assert b"".join(of(token) for token in tokenizer.encode(text).ids) == text.encode()


def test_sentencepiece_tokens_and_bytes() -> None:
    vocabulary = {"\u2581Hi": 0, "\u2581": 1, "<0xF0>": 2, "<0x0A>": 3, "é": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="é"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    of = TokenBytes(tokenizer)
    assert [of(token) for token in range(6)] == [b" Hi", b" ", b"\xf0", b"\n", "é".encode(), b""]


def test_special_tokens_are_their_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|> Ġ"])
    of = TokenBytes(tokenizer)
    assert of(tokenizer.token_to_id("<s>")) == b"<s>"
    assert of.special == {tokenizer.token_to_id("<s>"), tokenizer.get_vocab_size() - 1}
    assert of(tokenizer.get_vocab_size() - 1) == "<|im_end|> Ġ".encode()
