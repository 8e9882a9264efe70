"""The tokenizer of a GGUF file as tokenizer.json, built from its metadata alone.

Two kinds are known exactly: byte-level BPE (`gpt2`), whose splitting rules `tokenizer.ggml.pre` names, and the BPE of
SentencePiece (`llama`), whose merges follow from the scores of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.errors import SourceError
from gradmap_hub.layout import TOKENIZER_CONFIG
from gradmap_hub.models.gguf_header import USE_ORIGINAL, GgufHeader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEY = "tokenizer.ggml."
# Finding merges takes the square of a token's length; known tokens have up to 256 characters.
_LONGEST_TOKEN = 512
# Types of tokens in `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Splitting:
    """How text is split before byte-level BPE. `pattern`: regular expression of the pieces, that of GPT-2 if empty;
    `digits`: single digits are split off first; `composed`: text is normalised to NFC first; `whole`: a piece that is a
    token is not split, whatever the merges; `bos`: texts begin with the BOS token if the file does not say."""

    pattern: str = ""
    digits: bool = False
    composed: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA_3 = _Splitting(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole=True, bos=True)
_DIGITS = _Splitting(digits=True)
_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    # The published tokenizers compose characters, though llama.cpp does not.
    "qwen2": _Splitting(rf"{_WORDS}|\p{{N}}|{_REST}", composed=True),
    **dict.fromkeys(("smollm", "codeshell", "refact", "starcoder"), _DIGITS),
}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# Printable ASCII in byte-level form, where a space is "Ġ" and a line feed "Ċ".
_ASCII = {*map(chr, range(33, 127)), "Ġ", "Ċ"}
# Keys without effect on the ids of a text, beside the ids of single tokens.
_KNOWN = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_space_prefix",
    "token_type_count",
)  # fmt: skip
# Keys that only matter if they are true.
_MUST_BE_FALSE = ("add_sep_token", "remove_extra_whitespaces")


def check_tokenizer(header: GgufHeader, vocabulary: int) -> None:
    """Check that the tokenizer can be converted exactly.

    Args:
        vocabulary: The number of embeddings, which must be the number of tokens.

    Raises:
        SourceError: the rules of the tokenizer are not supported.
        BrokenCheckpointError: it is damaged.
    """
    kind = header.text(f"{_KEY}model")
    if kind not in ("gpt2", "llama"):
        raise _not_known(header, "model", kind, ("gpt2", "llama"))
    for key in header.metadata:
        name = key.removeprefix(_KEY)
        if name == key or name in _KNOWN or name.endswith(("_token_id", "_token_ids")):
            continue
        if name not in _MUST_BE_FALSE or header.flag(key, False):
            raise SourceError(f"{header.path.name}: the metadata key {key} is not supported.", hint=USE_ORIGINAL)
    tokens = header.entries(f"{_KEY}tokens", str, vocabulary)
    if len(set(tokens)) != len(tokens):
        raise header.broken(f"{_KEY}tokens has a token twice")
    header.entries(f"{_KEY}token_type", int, vocabulary)
    for key in _ROLES.values():
        if f"{_KEY}{key}_token_id" in header.metadata:
            header.integer(f"{_KEY}{key}_token_id", 0, vocabulary - 1)
    header.text("tokenizer.chat_template", "")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        header.flag(f"{_KEY}{name}", False)
    if kind == "gpt2":
        _check_byte_level(header, tokens)
    else:
        header.entries(f"{_KEY}scores", float, vocabulary)
        if max(map(len, tokens), default=0) > _LONGEST_TOKEN:
            raise header.broken(f"{_KEY}tokens has a token of more than {_LONGEST_TOKEN} characters")


def _check_byte_level(header: GgufHeader, tokens: list[str]) -> None:
    pre = header.text(f"{_KEY}pre", "default")
    if pre not in _SPLITTINGS:
        raise _not_known(header, "pre", pre, tuple(_SPLITTINGS))
    vocabulary = set(tokens)
    # Text of a byte without a token is dropped. Published vocabularies lack some control characters, but no others.
    if absent := sorted(_ASCII - vocabulary):
        raise header.broken(f"{_KEY}tokens has no token for {absent[0]!r}")
    for merge in header.entries(f"{_KEY}merges", str):
        parts = merge.split(" ")
        if len(parts) != 2 or not vocabulary.issuperset((*parts, "".join(parts))):
            raise header.broken(f"{_KEY}merges has {merge[:60]!r}, which does not join two tokens to a token")


def _not_known(header: GgufHeader, key: str, value: str, known: tuple[str, ...]) -> SourceError:
    return SourceError(
        f"{header.path.name}: {_KEY}{key} is {value[:60]!r}, which is not supported.",
        hint=f"Supported: {', '.join(known)}. {USE_ORIGINAL}",
    )


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write tokenizer.json, chat_template.jinja and, last, tokenizer_config.json into `folder`. `header`: of a file
    that passed `check_tokenizer`."""
    from tokenizers import AddedToken

    kind, tokens = header.metadata[f"{_KEY}model"], header.metadata[f"{_KEY}tokens"]
    types = header.metadata[f"{_KEY}token_type"]
    ids = {token: number for number, token in enumerate(tokens)}
    roles = {
        role: tokens[header.metadata[f"{_KEY}{key}_token_id"]]
        for role, key in _ROLES.items()
        if f"{_KEY}{key}_token_id" in header.metadata
    }
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(header, ids, roles)
    for token, token_type in zip(tokens, types, strict=True):
        special = token_type in (_CONTROL, _UNKNOWN) or token in roles.values()
        if token and (special or token_type == _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    _add_ends(header, tokenizer, roles, ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template := header.text("tokenizer.chat_template", ""):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The generic class would add token_type_ids, which `generate` rejects.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _byte_level(header: GgufHeader, ids: Mapping[str, int], _: Mapping[str, str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rules = _SPLITTINGS[header.text(f"{_KEY}pre", "default")]
    merges: list[tuple[str, str]] = [tuple(merge.split(" ")) for merge in header.metadata[f"{_KEY}merges"]]
    tokenizer = Tokenizer(models.BPE(dict(ids), merges, ignore_merges=rules.whole))
    steps: list[Any] = []
    if rules.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.pattern:
        steps.append(pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    if rules.composed:
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(header: GgufHeader, ids: Mapping[str, int], roles: Mapping[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores, types = header.metadata[f"{_KEY}scores"], header.metadata[f"{_KEY}token_type"]
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in ids.items():
        if types[number] in (_UNKNOWN, _CONTROL, _BYTE):  # never the result of a merge
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, token[:cut], token[cut:]))
    found.sort()
    merges = [(left, right) for *_, left, right in found]
    tokenizer = Tokenizer(
        models.BPE(dict(ids), merges, unk_token=roles.get("unk_token"), fuse_unk=True, byte_fallback=True)
    )
    prefixed = header.flag(f"{_KEY}add_space_prefix", True)
    before: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _add_ends(header: GgufHeader, tokenizer: Tokenizer, roles: Mapping[str, str], ids: Mapping[str, int]) -> None:
    """Make texts begin with the BOS token, or end with the EOS token, as the file or its kind says."""
    from tokenizers import processors

    byte_level = header.metadata[f"{_KEY}model"] == "gpt2"
    begins = _SPLITTINGS[header.text(f"{_KEY}pre")].bos if byte_level else True
    first = roles.get("bos_token") if header.flag(f"{_KEY}add_bos_token", begins) else None
    last = roles.get("eos_token") if header.flag(f"{_KEY}add_eos_token", False) else None
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    named = [token for token in (first, last) if token is not None]
    if named:
        around = [f"{first}:0"] * (first is not None), [f"{last}:0"] * (last is not None)
        one = [*around[0], "$A:0", *around[1]]
        two = [*one, *(piece[:-1].replace("$A", "$B") + "1" for piece in one)]
        steps.append(
            processors.TemplateProcessing(single=one, pair=two, special_tokens=[(name, ids[name]) for name in named])
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
