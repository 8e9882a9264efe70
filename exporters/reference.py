"""What PyTorch makes of a checkpoint in float32, computed once and kept in a file: every exported graph of the
checkpoint is compared with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PROMPTS = 3
PROMPT_TOKENS = 32
GREEDY_TOKENS = 256
# Steps on the cache whose logits are compared as a whole; of the others, which token is first.
COMPARED_STEPS = 8
_CHUNK = 64


def main(checkpoint: str, rows: str, destination: str) -> int:
    """Measure the checkpoint folder on `rows` (an .npy file, int64 (rows, tokens)) into the .npz file `destination`.

    `prompts` (prompts, tokens), the beginnings of the first rows; `logits` (prompts, tokens, vocabulary); `greedy`
    (tokens,), what follows the first prompt; `steps` (steps, vocabulary), the logits behind the first of these;
    `margins` (tokens,), by how much each is ahead of the second best; `losses` (rows,), mean over the tokens of a row,
    nats. Returns the number of layers.
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
    """Greedy decoding on the cache, through any end-of-text token."""
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
    for start in range(0, len(logits), _CHUNK):  # in double precision, and a vocabulary can be large
        part = logits[start : start + _CHUNK].double()
        lost += float(
            torch.nn.functional.cross_entropy(part, ids[0, 1 + start : 1 + start + len(part)], reduction="sum")
        )
    return lost / len(logits)
