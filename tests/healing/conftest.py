"""A tiny model, its own text, and what a training needs of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmap_hub.data.rows import Rows
from gradmap_hub.healing.corpus import Corpus, make_corpus
from gradmap_hub.healing.heal import Student, Teacher

TOKENS = 40
REMOVED = (1, 3)


def own_text(model: Any, prompts: Tensor) -> Tensor:
    """Sequences as the model itself would go on, where its loss is low."""
    with torch.no_grad():
        return model.generate(prompts, max_new_tokens=TOKENS - prompts.shape[1], do_sample=False, pad_token_id=0)


class World:
    """The original `model`, its text as a corpus, and its predictions."""

    def __init__(self, model: Any, make: dict[str, Callable[..., Any]], folder: Path, *, sequences: int = 60) -> None:
        self.model, self.make, self.folder = model, make, folder
        rows = own_text(model, make["rows"](14, 4))
        self.corpus: Corpus = make_corpus([(Rows("own", "0", rows[:8]), 1)], [Rows("own", "0", rows[8:])], sequences, 0)
        self.decoder = make["decoder"](model, TOKENS)
        self.teacher = self.teacher_of(self.corpus)
        for cache in self.teacher.parts:
            cache.fill(self.decoder)

    def teacher_of(self, corpus: Corpus) -> Teacher:
        # All tokens of the vocabulary: a random model has no likely ones.
        size = self.model.config.vocab_size
        return Teacher.of(corpus, self.folder / "teacher", size, "tiny", k=size)

    def student(self, identity: str = "student") -> Student:
        model = self.make["prune"](self.model, REMOVED)
        return Student(model, model.lm_head, self.decoder.architecture, identity)


@pytest.fixture
def world_of(
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    random_rows: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., World]:
    make = {"decoder": decoder_of, "prune": prune_copy, "rows": lambda count, width: random_rows(count, width)}

    def build(family: str = "llama", folder: Path = tmp_path, **options: Any) -> World:
        return World(model_of(family), make, folder, **options)

    return build


@pytest.fixture
def world(world_of: Callable[..., World]) -> World:
    return world_of()
