"""Sampling many texts at once from a model in PyTorch, as fast as a batch allows.

transformers' `generate` runs a batch until its longest text ends, copies the whole key-value cache for every token, and
repeats the keys and values of grouped-query attention for every head. Here texts that have ended leave the batch, the
cache is allocated once, and the heads of a group share one read of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmap_hub.models.original import end_tokens

# The batch is made smaller when this share of its rows has ended: what leaves costs one copy of the cache.
_ENDED = 0.2


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Tensor], tokens: int, *, temperature: float, top_p: float, top_k: int
) -> list[str]:
    """Continuations of `prompts` (each (tokens)) of at most `tokens` tokens, without special tokens. Of the `top_k`
    most likely tokens, those are drawn from that make up `top_p` of the probability at `temperature`."""
    ids, mask = _on_the_left(prompts, _pad_token(tokenizer))
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor(sorted(end_tokens(model, tokenizer)), device=model.device)
    found: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))  # the text of each row of the batch
    alive = torch.ones(len(prompts), dtype=torch.bool)
    cache = _cache(mask.shape[1] + tokens)
    given = inspect.signature(model.forward).parameters
    with torch.inference_mode(), _grouped_attention():
        for _ in range(tokens):
            inputs = {
                "input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True,
                "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :], "logits_to_keep": 1,
            }  # fmt: skip
            logits = model(**{name: value for name, value in inputs.items() if name in given}).logits[:, -1]
            ids = draw(logits, temperature, top_p, top_k)
            alive &= ~torch.isin(ids[:, 0], ends).cpu()
            for row, text, token in zip(alive.tolist(), rows.tolist(), ids[:, 0].tolist(), strict=True):
                if row:
                    found[text].append(token)
            if not alive.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if float(alive.float().mean()) <= 1 - _ENDED:
                kept = alive.nonzero()[:, 0]
                rows, alive = rows[kept], alive[kept]
                kept = kept.to(model.device)
                ids, mask = ids[kept], mask[kept]
                cache.batch_select_indices(kept)
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def draw(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One token for each row of logits (rows, vocabulary), as (rows, 1). A sort of the whole vocabulary, as a plain
    top-p needs, would cost more than the model."""
    values, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    probabilities = (values.float() / temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return indices.gather(-1, torch.multinomial(probabilities.masked_fill(before >= top_p, 0.0), 1))


def _on_the_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, so that all continue at the same place, and their mask: both (prompts, longest)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _pad_token(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _cache(capacity: int) -> Cache:
    """An empty cache with room for `capacity` tokens in each layer; in sliding ones, their masks hide the rest."""

    class Layer(_Allocated):
        room = capacity

    return Cache(layer_class_to_replicate=Layer)


class _Allocated(DynamicLayer):
    """A layer of the cache in memory that is allocated once; `keys` and `values` are views of what is filled."""

    room: int

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._memory = [
                states.new_empty(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
            ]
            self._filled = 0
        end = self._filled + key_states.shape[2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, self._filled : end] = states
        self._filled = end
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = []
        for memory in self._memory:
            smaller = memory.new_empty(len(indices), *memory.shape[1:])
            smaller[:, :, : self._filled] = memory[indices, :, : self._filled]
            kept.append(smaller)
        self._memory = kept
        self.keys, self.values = (memory[:, :, : self._filled] for memory in self._memory)


@contextmanager
def _grouped_attention() -> Iterator[None]:
    """Attention by scaled dot product for which the heads of a group are further queries of one head, where there is
    one token to a row: they see the same keys, so nothing is repeated."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def grouped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, width = query.shape
        if tokens > 1 or heads == key.shape[1] or (attention_mask is not None and attention_mask.shape[1] > 1):
            return plain(module, query, key, value, attention_mask, **options)
        found = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, width), key, value, attn_mask=attention_mask,
            scale=options.get("scaling"),
        )  # fmt: skip
        return found.reshape(batch, 1, heads, value.shape[-1]), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
