"""Text that the original generates itself, to calibrate or heal on: it needs no data set and resembles the model's use.

A chat model is given only the opening of a user's turn in its own template, so that it writes the question, and then
answers it (Magpie, arXiv 2406.08464). A base model continues from its first token. Samples that repeat themselves,
are too short, or are near duplicates of earlier ones are dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradmap_hub.errors import CalibrationError
from gradmap_hub.healing.sampling import sample
from gradmap_hub.healing.training import memory_kept
from gradmap_hub.measurements import repeated_share
from gradmap_hub.runtime.chat import chat_text
from gradmap_hub.runtime.text_model import PromptError

# (Content that is compared with other samples, whole sample in the chat template).
Draft: TypeAlias = tuple[str, str]

# Placeholder for the content of a message, to find where a template inserts it.
_MARK = "\u2063gradmap\u2063"


@dataclass(frozen=True)
class SelfTextRecipe:
    """How text is sampled and filtered.

    Attributes:
        temperature: Of conversations; below 1 the questions make more sense.
        text_temperature: Of a base model, which continues from its first token and needs the variety.
        top_p, top_k: See `sampling.draw`.
        batch: Most texts sampled together.
        question_tokens, answer_tokens: Maximum lengths. The text of a base model may have as many as both together.
        least_tokens: Shorter samples are dropped.
        repeated: Samples with a larger share of repeated word 4-grams are dropped.
        similar: Samples whose word 5-grams have this Jaccard similarity with an earlier sample are dropped; estimated
            by MinHash.
    """

    seed: int = 0
    temperature: float = 0.6
    text_temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 100
    batch: int = 96
    question_tokens: int = 96
    answer_tokens: int = 256
    least_tokens: int = 24
    repeated: float = 0.25
    similar: float = 0.7

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SelfText:
    """The samples kept, their number of `tokens`, how many were `drawn`, and how many were dropped for each reason."""

    samples: list[str]
    tokens: int
    drawn: int
    repetitive: int
    short: int
    duplicates: int


def write_self_text(
    model: Any,
    tokenizer: Any,
    tokens: int,
    recipe: SelfTextRecipe,
    advance: Callable[[int], None] = lambda _tokens: None,
    drafts: Drafts | None = None,
) -> SelfText:
    """Let `model` write about `tokens` tokens of conversations, or of plain text if it has no chat template. The same
    seed gives the same text on the same machine.

    Args:
        model: A causal LM of transformers.
        tokens: Sampling stops once the samples kept have this many tokens.
        recipe: How to sample and filter.
        advance: Called with the number of tokens of each sample kept.
        drafts: Stores the batches, so that an interrupted call resumes after the last one.

    Raises:
        CalibrationError: of 200 or more samples, less than 5% pass the filters; or the chat template fails.
    """
    draw = _conversations if tokenizer.chat_template else _continuations
    kept: list[str] = []
    seen = _Seen(recipe.similar)
    total = drawn = repetitive = short = duplicates = 0
    stored = drafts.read() if drafts is not None else []
    for number in itertools.count():
        if number < len(stored):
            batch = stored[number]
        else:
            rows = _rows(tokens - total, recipe)
            with torch.random.fork_rng(), memory_kept():
                torch.manual_seed(_seed(recipe.seed, number))
                batch = draw(model, tokenizer, recipe, rows)
            if drafts is not None:
                drafts.add(batch)
        for content, text in batch:
            drawn += 1
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if length < recipe.least_tokens:
                short += 1
            elif repeated_share(content) > recipe.repeated:
                repetitive += 1
            elif not seen.is_new(content):
                duplicates += 1
            else:
                kept.append(text)
                total += length
                advance(length)
            if total >= tokens:
                return SelfText(kept, total, drawn, repetitive, short, duplicates)
            if drawn >= 200 and len(kept) < drawn / 20:
                raise CalibrationError(
                    f"Of {drawn} texts that the model wrote, {len(kept)} pass the filters ({repetitive} repeat "
                    f"themselves, {short} are too short, {duplicates} are near duplicates).",
                    hint="Give a text file or a Hub data set instead of `self`.",
                )
    raise AssertionError  # unreachable: the batches do not end


def _seed(seed: int, batch: int) -> int:
    """The seed of batch number `batch`, independent of earlier batches; torch's CPU generator takes 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:4], "big")


class Drafts:
    """The batches sampled so far, stored in `file`, one JSON line each. `key`: identifies everything that they depend
    on; a file with another key is overwritten."""

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key

    def read(self) -> list[list[Draft]]:
        """The complete batches. A partial last line, left by an interrupted write, is removed from the file."""
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.is_file() else []
        batches: list[list[Draft]] = []
        good = [json.dumps(self._key).encode() + b"\n"]
        if lines[:1] == good:
            for line in lines[1:]:
                try:
                    batches.append([(content, sample) for content, sample in json.loads(line)])
                except ValueError:
                    break
                good.append(line)
        self._file.write_bytes(b"".join(good))
        return batches

    def add(self, batch: Sequence[Draft]) -> None:
        with self._file.open("ab") as stream:
            stream.write(json.dumps(batch).encode() + b"\n")

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)


def _rows(tokens: int, recipe: SelfTextRecipe) -> int:
    """Size of the next batch: enough texts for `tokens` even if the filters drop a third, at most `recipe.batch`."""
    return max(1, min(recipe.batch, math.ceil(1.5 * tokens / recipe.answer_tokens)))


class _Seen:
    """The texts so far, for the search for near duplicates (datasketch's MinHash)."""

    def __init__(self, similar: float) -> None:
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=similar, num_perm=64)
        self._count = 0

    def is_new(self, text: str) -> bool:
        """Whether no similar text was seen; remembers a new one."""
        from datasketch import MinHash

        words = text.lower().split()
        sketch = MinHash(num_perm=64, seed=1)
        grams = {" ".join(words[start : start + 5]) for start in range(max(1, len(words) - 4))}
        sketch.update_batch([gram.encode() for gram in grams])
        if self._index.query(sketch):
            return False
        self._index.insert(str(self._count), sketch)
        self._count += 1
        return True


def _conversations(model: Any, tokenizer: Any, recipe: SelfTextRecipe, rows: int) -> list[Draft]:
    """At most `rows` conversations, sampled as one batch: (question and answer, conversation in the chat template)."""
    opening = render(tokenizer, [{"role": "user", "content": _MARK}]).split(_MARK)[0]
    ids = tokenizer(opening, add_special_tokens=False)["input_ids"] or [_first_token(tokenizer)]
    starts = [torch.tensor(ids)] * rows
    written = [text.strip() for text in _write(model, tokenizer, starts, recipe.question_tokens, recipe)]
    questions = [text for text in written if text]
    if not questions:
        return [("", "")]
    prompts = [render(tokenizer, [{"role": "user", "content": question}], answer=True) for question in questions]
    ids = [torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    found: list[Draft] = []
    for question, answer in zip(questions, _write(model, tokenizer, ids, recipe.answer_tokens, recipe), strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        found.append((f"{question}\n{answer}", render(tokenizer, turns)))
    return found


def _continuations(model: Any, tokenizer: Any, recipe: SelfTextRecipe, rows: int) -> list[Draft]:
    """`rows` texts, sampled as one batch from the token that begins a document: (text, the same text)."""
    starts, length = [torch.tensor([_first_token(tokenizer)])] * rows, recipe.question_tokens + recipe.answer_tokens
    return [(text, text) for text in _write(model, tokenizer, starts, length, recipe, recipe.text_temperature)]


def _first_token(tokenizer: Any) -> int:
    """The token that begins a document."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, answer: bool = False) -> str:
    """Messages in the chat template; with `answer`, including the prompt for the model's turn.

    Raises:
        CalibrationError: the template fails.
    """
    try:
        return chat_text(tokenizer, messages, answer=answer)
    except PromptError as error:
        raise CalibrationError(error.message, hint="Give a text file or a Hub data set instead of `self`.") from error


def _write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    tokens: int,
    recipe: SelfTextRecipe,
    temperature: float | None = None,
) -> list[str]:
    return sample(
        model, tokenizer, prompts, tokens, top_p=recipe.top_p, top_k=recipe.top_k,
        temperature=recipe.temperature if temperature is None else temperature,
    )  # fmt: skip
