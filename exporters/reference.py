"""PyTorch's float32 outputs for a checkpoint, computed once and stored in a file; every exported graph is compared with
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PROMPTS = 3
PROMPT_TOKENS = 32
GREEDY_TOKENS = 256
# Decode steps whose logits are compared in full; for all others only the top-1 token is compared.
COMPARED_STEPS = 8
_CHUNK = 64


def main(checkpoint: str, rows: str, destination: str) -> int:
    """Run the checkpoint folder on `rows` (an .npy file, int64 (rows, tokens)) and write the .npz file `destination`.

    Arrays: `prompts` (prompts, tokens), the prefixes of the first sequences; `logits` (prompts, tokens, vocabulary);
    `greedy` (tokens,), the greedy continuation of the first prompt; `steps` (steps, vocabulary), the logits of its
    first steps; `margins` (tokens,), top-1 logit minus top-2 logit; `losses` (rows,), mean over the tokens of a
    sequence, in nats. Returns the number of layers.
    """
    import torch

    from gradmap_hub.models.checkpoint import load_model

    model, _ = load_model(Path(checkpoint))
    ids = np.load(rows)
    prompts = ids[:PROMPTS, :PROMPT_TOKENS]
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(row[None])).logits for row in prompts])
        steps, greedy, margins = _continue(model, prompts[:1])
        losses = [_loss(model, row) for row in ids]
    np.savez(
        destination,
        prompts=prompts,
        logits=logits.numpy(),
        steps=steps,
        greedy=greedy,
        margins=margins,
        losses=np.array(losses),
    )
    return int(model.config.num_hidden_layers)


def _continue(model: Any, prompt: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Greedy decoding with the cache, not stopping at end-of-text tokens."""
    import torch

    room = int(model.config.max_position_embeddings) - prompt.shape[1]
    ids, past = torch.from_numpy(prompt), None
    steps: list[npt.NDArray[Any]] = []
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(min(GREEDY_TOKENS, room)):
        output = model(ids, past_key_values=past, use_cache=True)
        past, last = output.past_key_values, output.logits[0, -1]
        if len(steps) < COMPARED_STEPS:
            steps.append(last.numpy())
        best = last.topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        ids = best.indices[None, :1]
    return np.stack(steps), np.array(tokens, np.int64), np.array(margins)


def _loss(model: Any, row: npt.NDArray[np.int64]) -> float:
    import torch

    ids = torch.from_numpy(row[None])
    logits = model(ids).logits[0, :-1]
    lost = 0.0
    for start in range(0, len(logits), _CHUNK):  # in chunks: float64 logits of a large vocabulary are big
        part = logits[start : start + _CHUNK].double()
        lost += float(
            torch.nn.functional.cross_entropy(part, ids[0, 1 + start : 1 + start + len(part)], reduction="sum")
        )
    return lost / len(logits)
