"""Log-probabilities of tokens: those of the model itself, before temperature, penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The lowest log-probability, as in the OpenAI API: that of a token whose probability rounds to 0.
LEAST = -9999.0


@dataclass(frozen=True)
class Scoring:
    """What a generation scores. `top`: how many of the most probable tokens to list at each position; `prompt`: the
    tokens of the prompt too, not only those of the output."""

    top: int = 0
    prompt: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in nats, None for the first token of a prompt. `top`: (token id, log-probability)
    of the most probable tokens at this position, most probable first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def score(logits: np.ndarray, token: int, top: int) -> TokenScore:
    """Return the score of a token given the logits (vocabulary,) of its position; `top`: how many tokens to list."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    count = min(top, len(values))
    best: tuple[tuple[int, float], ...] = ()
    if count:
        least = np.partition(values, -count)[-count]
        # At a tie for the last place there are more than `count`.
        likely = np.flatnonzero(values >= least)
        likely = likely[np.argsort(-values[likely], kind="stable")][:count]
        best = tuple((int(each), _finite(values[each])) for each in likely)
    return TokenScore(token, _finite(values[token]), best)


def scores(logits: np.ndarray, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Return the score of each token given its row of logits (tokens, vocabulary).

    Row by row: in float64, all rows of a prefill step at once would need gigabytes for a large vocabulary.
    """
    return [score(row, token, top) for row, token in zip(logits, tokens, strict=True)]


def negative_log_likelihoods(logits: np.ndarray, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the loss in nats of each token given its logits (tokens, vocabulary): (tokens,) float64."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=1)
    normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return normaliser - logits[np.arange(len(logits)), np.asarray(token_ids)]


def _finite(value: float) -> float:
    return float(max(LEAST, value))  # NaN, of a damaged model, becomes LEAST too: JSON has no NaN
