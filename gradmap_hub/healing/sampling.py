"""Batched sampling from a model in PyTorch.

transformers' `generate` runs a batch until its longest text ends, copies the whole KV cache for every token, and
repeats the keys and values of grouped-query attention for every head. Here finished texts leave the batch, the cache is
allocated once, and the query heads of a group share one read of it.
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

# The batch shrinks once this share of its texts has ended; shrinking copies the cache once.
_ENDED = 0.2


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Tensor], tokens: int, *, temperature: float, top_p: float, top_k: int
) -> list[str]:
    """Sample one continuation per prompt, decoded without special tokens.

    Args:
        model: A causal LM of transformers.
        prompts: Token ids, (length,) int64 each.
        tokens: Maximum length of a continuation.
        temperature, top_p, top_k: See `draw`.
    """
    ids, mask = _on_the_left(prompts, _pad_token(tokenizer))
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor(sorted(end_tokens(model, tokenizer)), device=model.device)
    found: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))  # index into `prompts` of each row of the batch
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
    """Sample one token id for each row of `logits` (rows, vocabulary): (rows, 1) int64.

    At `temperature`, top-p is applied among the `top_k` most likely tokens, whose probabilities are renormalised first:
    sorting the whole vocabulary, as plain top-p does, would cost more than the model."""
    values, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    probabilities = (values.float() / temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return indices.gather(-1, torch.multinomial(probabilities.masked_fill(before >= top_p, 0.0), 1))


def _on_the_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """The prompts, left-padded so that all end at the same position, and their attention mask: (prompts, longest)
    each."""
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
    """An empty KV cache with room for `capacity` tokens in every layer. Sliding-window layers also keep all tokens; the
    attention mask hides those outside the window."""

    class Layer(_Allocated):
        room = capacity

    return Cache(layer_class_to_replicate=Layer)


class _Allocated(DynamicLayer):
    """A layer of the KV cache, allocated once for `room` tokens; `keys` and `values` are views of the filled part."""

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
    """Inside this context, "sdpa" attention with one query token per text passes the query heads of a group as several
    queries of one head. They attend to the same keys, so keys and values are not repeated. Other calls are
    unchanged."""
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
