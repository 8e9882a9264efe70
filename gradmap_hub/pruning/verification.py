"""The saved folder must compute the same as the model in memory: load it with plain transformers and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.errors import VerificationError
from gradmap_hub.models.architectures import dimension
from gradmap_hub.record import VerificationRecord

LOGIT_LIMIT = 1e-4
# Decoding token by token sums in another order than a pass over the whole sequence.
CACHE_LIMIT = 1e-3
_LONGEST = 2048
_GENERATED = 12


def probe_ids(config: Any) -> Tensor:
    """A fixed sequence of token ids (1, n), longer than the sliding window where affordable: a wrong attention type
    only shows beyond the window."""
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None) or 0
    longest = dimension(config.to_dict(), "max_position_embeddings") or _LONGEST
    length = min(max(64, window + 16), _LONGEST, longest - _GENERATED)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(1000, config.vocab_size - 1), (1, length), generator=generator)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) float32 of ids (1, tokens)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].float()


def verify(reloaded: Any, report: dict[str, Any], folder: Path, expected: Tensor) -> VerificationRecord:
    """Check the tensor names, the logits of the probe, and that decoding with the KV cache equals a pass without it.

    Args:
        reloaded: The model that plain transformers loaded from `folder`.
        report: transformers' report of that loading.
        expected: Logits of `probe_ids` by the model in memory, (tokens, vocabulary).

    Raises:
        VerificationError: tensor names differ, logits differ by more than LOGIT_LIMIT, or those of the two ways of
            decoding by more than CACHE_LIMIT.
    """
    keys_match = not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = probe_ids(reloaded.config)
    difference = float((logits_of(reloaded, ids) - expected).abs().max())
    generation = _generation_matches(reloaded, ids[:, :16])
    record = VerificationRecord(keys_match, difference, ids.shape[1], generation)
    if not keys_match or not difference <= LOGIT_LIMIT or not generation:
        raise VerificationError(
            f"The checkpoint written to {folder} differs from the model in memory: keys "
            f"{'match' if keys_match else 'differ'}, logits differ by {difference:.2g}, generation with cache "
            f"{'matches' if generation else 'differs'}.",
            hint="Nothing was published. This is a bug: please report the model and the command.",
        )
    return record


def _generation_matches(model: Any, ids: Tensor) -> bool:
    """Whether the logits of greedy decoding with the KV cache equal those of one pass over the whole text."""
    steps: list[Tensor] = []
    row = ids
    past = None
    with torch.no_grad():
        for _ in range(_GENERATED):
            step = model(input_ids=row if past is None else row[:, -1:], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits[0, -1].float())
            row = torch.cat([row, step.logits[:, -1:].argmax(-1)], dim=1)
        whole = model(input_ids=row[:, :-1], use_cache=False).logits[0, -_GENERATED:].float()
    return float((torch.stack(steps) - whole).abs().max()) <= CACHE_LIMIT
