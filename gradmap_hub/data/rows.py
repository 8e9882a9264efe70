"""Text -> sequences of tokens, split so that fitting, selection and evaluation never share a sequence.

Each text is tokenised as a whole and cut into non-overlapping sequences ("rows"). The last ones of a calibration text
are held out for evaluation. From the rest a seeded draw takes the fitting sequences (the first of them also score the
layers) and then the selection sequences, which decide between candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.data.texts import Text
from gradmap_hub.errors import CalibrationError
from gradmap_hub.models.tokenizer_trial import failures_named


@dataclass(frozen=True)
class Rows:
    """Sequences of the text `name`: ids (n, seq_len) int64; `sha256` of the whole text."""

    name: str
    sha256: str
    ids: Tensor


@dataclass(frozen=True)
class CalibrationRows:
    """The sequences of a run. `fit`, `selection` and `held_out` are disjoint.

    Attributes:
        fit: For scoring and compensation, (n, seq_len) int64.
        selection: For decisions between candidates, (m, seq_len) int64.
        held_out: For evaluation, by text.
        sources: The sequences of `fit`, by text.
        training: What healing may train on, by text: all sequences except `selection` and `held_out`.
    """

    fit: Tensor
    selection: Tensor
    held_out: list[Rows]
    sources: list[Rows]
    training: list[Rows] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the token ids of `fit`, in order."""
        return sha256_of_ids(self.fit)


def sha256_of_ids(ids: Tensor) -> str:
    """Hash of token ids, in order."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def tokenize(text: Text, tokenizer: Any, seq_len: int, vocabulary: int | None = None) -> Rows:
    """Cut a text into sequences of `seq_len` tokens. Each starts with the tokenizer's initial special tokens: models
    trained with <bos> (Gemma, Llama) predict far worse without it. An incomplete last sequence is dropped.

    Args:
        tokenizer: A tokenizer of transformers.
        seq_len: Initial special tokens included.
        vocabulary: Number of embeddings of the model; None: token ids are not checked.

    Raises:
        CalibrationError: the text contains a token that the embedding has no row for.
        SourceError: the tokenizer fails on the text.
    """
    with failures_named(f"the model, on the text {text.name},"):
        ids = tokenizer(text.content, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        first = _start(tokenizer)
    if vocabulary is not None and (highest := max([*first, *ids], default=0)) >= vocabulary:
        raise CalibrationError(
            f"The text {text.name} contains the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id "
            f"{highest}, but the model's embedding has {vocabulary} rows (vocab_size).",
            hint="Remove the token from the text, or use the tokenizer and weights of the same revision.",
        )
    start = torch.tensor(first, dtype=torch.long)
    own = seq_len - len(start)
    count = len(ids) // own
    rows = torch.tensor(ids[: count * own], dtype=torch.long).view(count, own)
    return Rows(text.name, text.sha256, torch.cat([start.expand(count, -1), rows], dim=1))


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """The number of embeddings (vocab_size) that a config.json states; None if it states none."""
    rows = config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def _start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; usually none or one."""
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[: next((place for place in range(len(ids)) if ids[place : place + len(word)] == word), 0)]


def split_rows(
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    seq_len: int,
    samples: int,
    selection: int,
    held_out: int,
    seed: int,
    vocabulary: int | None = None,
) -> CalibrationRows:
    """Draw the sequences of a run, an equal share from each text.

    Args:
        samples, selection, held_out: Number of sequences to fit, to select and to evaluate on, over all texts; each
            text gives at least one to each.
        seed: Of the draw.
        seq_len, vocabulary: See `tokenize`.

    Raises:
        CalibrationError: a text is too short, is given twice, or contains a token that the model does not have.
    """
    if len({text.sha256 for text in texts}) < len(texts):
        raise CalibrationError(
            "The same calibration text is given twice; a sequence could be used both for fitting and for selection.",
            hint="Give each text once; every text gets an equal share of the sequences.",
        )
    generator = torch.Generator().manual_seed(seed)
    fit: list[Tensor] = []
    select: list[Tensor] = []
    held: list[Rows] = []
    sources: list[Rows] = []
    training: list[Rows] = []
    for position, text in enumerate(texts):
        rows = tokenize(text, tokenizer, seq_len, vocabulary)
        fit_share = _share(samples, len(texts), position)
        selection_share = _share(selection, len(texts), position)
        held_share = _share(held_out, len(texts), position)
        needed = fit_share + selection_share + held_share
        if len(rows.ids) < needed:
            raise CalibrationError(
                f"The calibration text {text.name} is too short: {len(rows.ids) * seq_len:,} tokens in sequences of "
                f"{seq_len}, {needed * seq_len:,} needed.",
                hint="Give a longer text, or fewer or shorter sequences with --samples, --eval-rows, --seq-len.",
            )
        usable = len(rows.ids) - held_share
        order = torch.randperm(usable, generator=generator)
        fit.append(rows.ids[order[:fit_share]])
        select.append(rows.ids[order[fit_share : fit_share + selection_share]])
        others = torch.cat([order[:fit_share], order[fit_share + selection_share :]])
        held.append(Rows(text.name, text.sha256, rows.ids[usable:]))
        training.append(Rows(text.name, text.sha256, rows.ids[others]))
        sources.append(Rows(text.name, text.sha256, fit[-1]))
    # Interleaved, so that the first sequences, which score the layers, include every text.
    return CalibrationRows(_interleave(fit), _interleave(select), held, sources, training)


def evaluation_rows(text: Text, tokenizer: Any, *, seq_len: int, rows: int, vocabulary: int | None = None) -> Rows:
    """`rows` sequences spread evenly over a text. `seq_len`, `vocabulary`: see `tokenize`.

    Raises:
        CalibrationError: the text is too short, or contains a token that the model does not have.
    """
    cut = tokenize(text, tokenizer, seq_len, vocabulary)
    if len(cut.ids) < rows:
        raise CalibrationError(
            f"The evaluation text {text.name} is too short: {len(cut.ids) * seq_len:,} tokens, "
            f"{rows * seq_len:,} needed.",
            hint="Give a longer text, or fewer or shorter sequences with --eval-rows, --seq-len.",
        )
    step = len(cut.ids) // rows
    return Rows(cut.name, cut.sha256, cut.ids[::step][:rows])


def _share(total: int, parts: int, index: int) -> int:
    """The integer share of part `index` when `total` is split evenly over `parts`; at least 1."""
    return max(1, total // parts + (1 if index < total % parts else 0))


def _interleave(groups: Sequence[Tensor]) -> Tensor:
    longest = max(len(group) for group in groups)
    picked = [group[row] for row in range(longest) for group in groups if row < len(group)]
    return torch.stack(picked)
