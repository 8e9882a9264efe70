"""Sampling of many texts at once, against transformers' own `generate` of each text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmap_hub.healing.sampling import draw, sample

FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
LENGTHS = (3, 9, 1, 17, 6)  # the sliding windows of the models are 12 tokens
TOKENS = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_likely_tokens_are_those_of_generate(
    family: str, model_of: Callable[..., Any], tokenizer: Any
) -> None:
    """Of texts of different lengths, some of which end early and leave the batch."""
    model = model_of(family)
    prompts = [torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]

    def alone(prompt: torch.Tensor, ends: list[int] | None) -> list[int]:
        found = model.generate(prompt[None], max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0)
        return found[0, len(prompt) :].tolist()

    # Tokens that some of the texts have in their middle end them.
    ends = [tokenizer.eos_token_id, alone(prompts[0], None)[4], alone(prompts[3], None)[11]]
    wanted = []
    for prompt in prompts:
        tokens = alone(prompt, ends)
        wanted.append(tokens[:-1] if tokens[-1] in ends else tokens)
    assert len({len(tokens) for tokens in wanted}) > 1
    model.generation_config.eos_token_id = ends
    try:
        found = sample(model, tokenizer, prompts, TOKENS, temperature=1.0, top_p=1.0, top_k=1)
    finally:
        model.generation_config.eos_token_id = None
    assert found == tokenizer.batch_decode(wanted, skip_special_tokens=True)


def test_attention_is_transformers_own_again(model_of: Callable[..., Any], tokenizer: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    sample(model_of("llama"), tokenizer, [torch.tensor([5])], 2, temperature=1.0, top_p=1.0, top_k=5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_what_is_drawn_has_the_probabilities_of_the_nucleus() -> None:
    """At temperature 2 and top-p 0.9 of a distribution that is written down."""
    probabilities = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.1])
    torch.manual_seed(0)
    logits = (2 * probabilities.log()).expand(20_000, -1)
    found = torch.bincount(draw(logits, 2.0, 0.9, 4)[:, 0], minlength=5) / 20_000
    # The four most likely come to 0.98 and are scaled to 1: 0.51, 0.31, 0.10, 0.08; the first three reach 0.9.
    wanted = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.1]) / 0.9
    assert torch.allclose(found, wanted, atol=0.01)
