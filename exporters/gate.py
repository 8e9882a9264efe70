"""The check that every exported graph must pass before it is published.

A fresh process loads the graph with ONNX Runtime and compares it with PyTorch float32 on the same checkpoint: logits
without and with past, a greedy continuation of 256 tokens, and perplexity on held-out sequences.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradmap_hub.exporters.processes import WorkerFailed, call
from gradmap_hub.formats import Limits
from gradmap_hub.record import Parity

# Stands for infinity, which JSON cannot represent; no working graph reaches it.
_WORST = 1e30
_CHUNK = 64


@dataclass(frozen=True)
class GateResult:
    """The result of the check.

    `greedy_tokens_equal` of `greedy_tokens` equal PyTorch's, each given PyTorch's previous tokens. `perplexity` and
    `reference_perplexity`: exp of the mean loss over the held-out sequences, of the graph and of the float32
    checkpoint. `reason` is empty if the graph passed."""

    passed: bool
    reason: str
    provider: str = ""
    max_logit_difference: float = 0.0
    max_logit_difference_with_past: float = 0.0
    greedy_tokens: int = 0
    greedy_tokens_equal: int = 0
    perplexity: float = 0.0
    reference_perplexity: float = 0.0

    @property
    def ratio(self) -> float:
        """Perplexity divided by the checkpoint's; infinite if the graph did not run."""
        return self.perplexity / self.reference_perplexity if self.reference_perplexity else math.inf

    def parity(self) -> Parity:
        """This result as the record's Parity."""
        equal = self.greedy_tokens > 0 and self.greedy_tokens == self.greedy_tokens_equal
        return Parity(self.max_logit_difference, self.max_logit_difference_with_past, equal, self.greedy_tokens)


def check(graph: Path, reference: Path, rows: Path, layers: int, head_size: int, limits: Limits) -> GateResult:
    """Check the graph in a fresh process.

    Args:
        graph: The ONNX file.
        reference: The .npz file that `reference.main` wrote for `rows`.
        rows: An .npy file of held-out token ids, (sequences, tokens) int64.
        layers: Number of decoder layers that the graph must have.
        head_size: Width of keys and values, for graphs that do not state it.
        limits: Those of the format.
    """
    try:
        result = call(
            "gate",
            {
                "graph": str(graph),
                "reference": str(reference),
                "rows": str(rows),
                "layers": layers,
                "head_size": head_size,
                "limits": dataclasses.asdict(limits),
            },
        )
    except WorkerFailed as error:
        return GateResult(False, f"ONNX Runtime cannot run it: {error}")
    return GateResult(**result)


def main(graph: str, reference: str, rows: str, layers: int, head_size: int, limits: dict[str, Any]) -> dict[str, Any]:
    """The check itself, run in the current process; arguments as in `check`. Returns the fields of a GateResult."""
    from gradmap_hub.exporters.session import Session

    session = Session(Path(graph), head_size)
    if session.key_values != 2 * layers:
        reason = f"it has {session.key_values} key and value inputs, not two for each of {layers} layers"
        return dataclasses.asdict(GateResult(False, reason, session.provider))
    with np.load(reference) as file:
        expected = {name: file[name] for name in file.files}
    return dataclasses.asdict(_measure(session, expected, np.load(rows), Limits(**limits)))


def _measure(session: Any, expected: dict[str, Any], rows: Any, limits: Limits) -> GateResult:
    prompts = expected["prompts"]
    plain = max(
        _difference(session.logits(prompt[None])[0], logits)
        for prompt, logits in zip(prompts, expected["logits"], strict=True)
    )
    with_past, equal, significant = _decode(session, expected, limits.logits or 0.0)
    losses = [_loss(session, row) for row in rows]
    measured = GateResult(
        passed=True,
        reason="",
        provider=session.provider,
        max_logit_difference=plain,
        max_logit_difference_with_past=with_past,
        greedy_tokens=len(expected["greedy"]),
        greedy_tokens_equal=equal,
        perplexity=_perplexity(losses),
        reference_perplexity=_perplexity(expected["losses"]),
    )
    reason = _reason(measured, significant, limits)
    return dataclasses.replace(measured, passed=not reason, reason=reason)


def _reason(measured: GateResult, significant: int, limits: Limits) -> str:
    largest = max(measured.max_logit_difference, measured.max_logit_difference_with_past)
    if limits.logits is not None and largest > limits.logits:
        return f"logits differ from PyTorch's by up to {largest:.2g}, more than {limits.logits:g}"
    if limits.greedy and significant:
        return f"{significant} of {measured.greedy_tokens} greedy tokens differ from PyTorch's"
    if measured.ratio > limits.perplexity:
        return (
            f"perplexity {measured.perplexity:.2f} is {(measured.ratio - 1) * 100:.1f} % above the checkpoint's "
            f"{measured.reference_perplexity:.2f}, more than {(limits.perplexity - 1) * 100:.1f} %"
        )
    return ""


def _decode(session: Any, expected: dict[str, Any], tolerance: float) -> tuple[float, int, int]:
    """Decode with the cache along PyTorch's greedy tokens. Returns the largest difference of logits, the number of
    equal top-1 tokens, and the number of different ones where PyTorch's margin exceeds twice the tolerance.

    If all are equal, free-running greedy decoding gives the same text, because every step has the same prefix."""
    past = session.empty()
    ids = expected["prompts"][:1]
    largest, equal, significant = 0.0, 0, 0
    for place, token in enumerate(expected["greedy"]):
        logits, past = session.step(ids, past)
        last = logits[0, -1]
        if place < len(expected["steps"]):
            largest = max(largest, _difference(last, expected["steps"][place]))
        if int(np.argmax(last)) == int(token):
            equal += 1
        elif expected["margins"][place] > 2 * tolerance:
            significant += 1
        ids = np.array([[token]], np.int64)
    return largest, equal, significant


def _difference(left: Any, right: Any) -> float:
    found = float(np.max(np.abs(left.astype(np.float64) - right)))
    return found if math.isfinite(found) else _WORST


def _loss(session: Any, row: Any) -> float:
    """Mean negative log-likelihood, in nats, of a sequence's tokens after the first."""
    logits = session.logits(row[None])[0, :-1]
    lost = 0.0
    for start in range(0, len(logits), _CHUNK):  # in chunks: float64 logits of a large vocabulary are big
        part = logits[start : start + _CHUNK].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        targets = row[1 + start : 1 + start + len(part)]
        lost += float(np.log(np.exp(part).sum(axis=1)).sum() - part[np.arange(len(part)), targets].sum())
    return lost / len(logits)


def _perplexity(losses: Any) -> float:
    mean = float(np.mean(losses))
    return math.exp(mean) if mean < 60 else _WORST  # also for NaN
