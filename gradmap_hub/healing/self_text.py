"""Text that the original writes itself, to calibrate or to heal on: no data set, and what its users ask it for.

A chat model is given only the opening of a user's turn in its own template, so that it writes the question, and then
answers it (Magpie, arXiv 2406.08464). A base model continues from its first token. Samples that repeat themselves,
are too short, or are near duplicates of earlier ones are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.errors import CalibrationError
from gradmap_hub.healing.sampling import sample
from gradmap_hub.healing.training import memory_kept
from gradmap_hub.measurements import repeated_share
from gradmap_hub.units import reason_of

# Stands for the content of a message when a template is taken apart.
_MARK = "\u2063gradmap\u2063"


@dataclass(frozen=True)
class SelfTextRecipe:
    """How text is sampled and filtered.

    `temperature` is that of conversations: below 1 the questions make more sense. `text_temperature` is that of a base
    model, which continues from its first token and needs the variety.
    `repeated`: the largest share of 4-grams of words that occurred before in a sample. `similar`: the largest Jaccard
    similarity of the word 5-grams of two samples, estimated by MinHash."""

    seed: int = 0
    temperature: float = 0.6
    text_temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 100
    batch: int = 64
    question_tokens: int = 96
    answer_tokens: int = 256
    least_tokens: int = 24
    repeated: float = 0.25
    similar: float = 0.7

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SelfText:
    """The samples, and how many were drawn and dropped. `tokens`: of the samples kept."""

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
) -> SelfText:
    """Let `model` write about `tokens` tokens of conversations, or of plain text if it has no chat template. The same
    seed gives the same text on the same machine.

    Raises:
        CalibrationError: almost nothing of what the model writes passes the filters.
    """
    draw = _conversations if tokenizer.chat_template else _continuations
    kept: list[str] = []
    seen = _Seen(recipe.similar)
    total = drawn = repetitive = short = duplicates = 0

    def rows() -> int:
        return _rows(tokens - total, recipe)

    with torch.random.fork_rng(), memory_kept():
        torch.manual_seed(recipe.seed)
        for content, sample in draw(model, tokenizer, recipe, rows):
            drawn += 1
            length = len(tokenizer(sample, add_special_tokens=False)["input_ids"])
            if length < recipe.least_tokens:
                short += 1
            elif repeated_share(content) > recipe.repeated:
                repetitive += 1
            elif not seen.is_new(content):
                duplicates += 1
            else:
                kept.append(sample)
                total += length
                advance(length)
            if total >= tokens:
                break
            if drawn >= 200 and len(kept) < drawn / 20:
                raise CalibrationError(
                    f"Of {drawn} texts that the model wrote, {len(kept)} pass the filters ({repetitive} repeat "
                    f"themselves, {short} are too short, {duplicates} are near duplicates).",
                    hint="Give a text instead of `self`.",
                )
    return SelfText(kept, total, drawn, repetitive, short, duplicates)


def _rows(tokens: int, recipe: SelfTextRecipe) -> int:
    """How many texts to write together: enough for `tokens`, should a third of them be lost to the filters."""
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


def _conversations(
    model: Any, tokenizer: Any, recipe: SelfTextRecipe, rows: Callable[[], int]
) -> Iterator[tuple[str, str]]:
    """Endless (question and answer, the conversation in the model's template), `rows()` written together."""
    opening = render(tokenizer, [{"role": "user", "content": _MARK}]).split(_MARK)[0]
    ids = tokenizer(opening, add_special_tokens=False)["input_ids"] or [_first_token(tokenizer)]
    start = torch.tensor(ids)
    while True:
        questions = [
            text.strip()
            for text in _write(model, tokenizer, [start] * rows(), recipe.question_tokens, recipe)
            if text.strip()
        ]
        if not questions:
            yield "", ""
            continue
        prompts = [render(tokenizer, [{"role": "user", "content": question}], answer=True) for question in questions]
        ids = [torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
        for question, answer in zip(
            questions, _write(model, tokenizer, ids, recipe.answer_tokens, recipe), strict=True
        ):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
            yield f"{question}\n{answer}", render(tokenizer, turns)


def _continuations(
    model: Any, tokenizer: Any, recipe: SelfTextRecipe, rows: Callable[[], int]
) -> Iterator[tuple[str, str]]:
    """Endless (text, text), each from the token that begins a document, `rows()` written together."""
    start = torch.tensor([_first_token(tokenizer)])
    while True:
        length = recipe.question_tokens + recipe.answer_tokens
        for text in _write(model, tokenizer, [start] * rows(), length, recipe, recipe.text_temperature):
            yield text, text


def _first_token(tokenizer: Any) -> int:
    """The token that begins a document."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, answer: bool = False) -> str:
    """Messages in the chat template (transformers renders it in a sandbox); with `answer`, up to where the model's turn
    begins.

    Raises:
        CalibrationError: the template fails.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates raise their own
        raise CalibrationError(
            f"The chat template of the model fails: {reason_of(error)}", hint="Give a text instead of `self`."
        ) from error


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
