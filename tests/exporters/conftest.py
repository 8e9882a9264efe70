"""Tiny models exported for real, each once for all tests that look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def sampled_rows(folder: Path, rows: int = 4, tokens: int = 96, seed: int = 0) -> np.ndarray:
    """Text that the model itself is likely to write, (rows, tokens) int64: what damages it shows in its perplexity."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    ids = model.generate(
        torch.randint(3, model.config.vocab_size, (rows, 1)),
        attention_mask=torch.ones((rows, 1), dtype=torch.int64),
        max_new_tokens=tokens - 1,
        min_new_tokens=tokens - 1,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    return ids.numpy()


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., np.ndarray]:
    return sampled_rows


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[..., Path]) -> Callable[..., SimpleNamespace]:
    """`shop(family, tied=...)`: a checkpoint, rows, and a work folder that all exports of it share."""
    made: dict[Any, SimpleNamespace] = {}

    def make(family: str = "llama", **options: Any) -> SimpleNamespace:
        key = (family, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(f"shop-{family}")
            checkpoint = folder_of(root / "checkpoint", family, **options)
            rows = sampled_rows(checkpoint)
            fit = sampled_rows(checkpoint, rows=8, seed=1)
            made[key] = SimpleNamespace(checkpoint=checkpoint, rows=rows, fit=fit, work=root / "work", root=root)
        return made[key]

    return make
