"""Optional after stage 2: a short distillation of the kept layers around the gaps, with the original as teacher.

Stage 2 solves for single linears that write to the residual stream. Here all weight matrices of the last kept layer
before a gap and of the first few after it are trained together, on the divergence of the next-token distributions:

    min   mean over tokens of KL(p || p') = sum_v p_v (log p_v - log p'_v)       p the original's, p' the pruned model's

The pruned model's stream up to the first trained layer and the original's up to its end are computed once per
sequence. A step runs the rest of the pruned model forward and backward on one sequence. Only existing weights change.
The paper (arXiv 2602.14649) trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.models.decoder import LOGIT_CHUNK, Decoder
from gradmap_hub.progress import Reporter
from gradmap_hub.pruning.compensation import Overrides, lowers
from gradmap_hub.pruning.streams import stream_losses
from gradmap_hub.record import HealCheck, HealRecord

# Peak learning rate of AdamW; docs/method.md has the measurements.
RATE = 3e-4
BETAS = (0.9, 0.95)
# Share of the steps with a rising rate; over the rest it falls along a cosine to almost 0.
WARM_UP = 0.1
# Trained layers after each gap.
LAYERS_BEHIND = 2
# Number of checks of the held-out loss during training. The best state is kept.
CHECKS = 4


def layers_around_gaps(kept: Sequence[int], removed: Sequence[int], behind: int = LAYERS_BEHIND) -> list[int]:
    """The last kept layer before each gap and the first `behind` after it, ascending."""
    found: set[int] = set()
    for layer in removed:
        # Layers of one gap have the same neighbours.
        found.update([other for other in kept if other < layer][-1:])
        found.update([other for other in kept if other > layer][:behind])
    return sorted(found)


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step (from 0) as a share of its peak: linear warm-up, then a cosine to almost 0."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def divergence_gradient(decoder: Decoder, reached: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """KL(p || p') in nats per token and its gradient with respect to `reached`.

    `wanted` and `reached`: the streams after the last layer, (batch, tokens, d), of the original (p) and of the trained
    model (p'). The gradient with respect to the logits is (p' - p) / tokens, so that it is computed for a few positions
    at a time.
    """
    inputs = reached.detach().requires_grad_(True)
    tokens = reached.shape[0] * reached.shape[1]
    total = 0.0
    for start in range(0, reached.shape[1], LOGIT_CHUNK):
        with torch.no_grad():
            teacher = decoder.head(decoder.norm(wanted[:, start : start + LOGIT_CHUNK])).float().log_softmax(dim=-1)
        with torch.enable_grad():
            logits = decoder.head(decoder.norm(inputs[:, start : start + LOGIT_CHUNK]))
        student = logits.detach().float().log_softmax(dim=-1)
        probabilities = teacher.exp()
        total += float((probabilities * (teacher - student)).sum())
        logits.backward(((student.exp_() - probabilities) / tokens).to(logits.dtype))
    assert inputs.grad is not None
    return total / tokens, inputs.grad


class _Masters:
    """Master copies, in at least float32, of the weight matrices of some layers, with AdamW on them. Within `in_place`
    the layers compute with these values, rounded to the model's dtype; afterwards the model is restored."""

    def __init__(self, decoder: Decoder, layers: Sequence[int]) -> None:
        self._decoder = decoder
        self._parameters: dict[tuple[int, str], nn.Parameter] = {
            (layer, name): parameter
            for layer in layers
            for name, parameter in decoder.layers[layer].named_parameters()
            if parameter.ndim >= 2
        }
        self._masters = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self._parameters.values()
        ]
        # Weight decay would pull the weights away from the original, towards zero.
        self._optimizer = torch.optim.AdamW(self._masters, lr=0.0, betas=BETAS, weight_decay=0.0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for ((layer, name), parameter), master in zip(self._parameters.items(), self._masters, strict=True):
                stack.enter_context(self._decoder.replaced(layer, {name: master.to(parameter.dtype)}))
                stack.callback(_stop_training, parameter)
                parameter.requires_grad_(True)
            yield

    def step(self, rate: float) -> None:
        """One step of AdamW with the gradients of the last backward pass."""
        for parameter, master in zip(self._parameters.values(), self._masters, strict=True):
            # An expert without tokens of this sequence has no gradient; AdamW leaves it unchanged.
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        for parameter, master in zip(self._parameters.values(), self._masters, strict=True):
            master.grad = None
            parameter.data.copy_(master)  # a no-op if the two are one tensor

    def values(self) -> Overrides:
        """Copies of the current weights, in the model's dtype."""
        return {key: parameter.detach().clone() for key, parameter in self._parameters.items()}


def _stop_training(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None


def heal_model(
    decoder: Decoder,
    rows: CalibrationRows,
    removed: Sequence[int],
    corrected: Mapping[tuple[int, str], Tensor],
    steps: int,
    seed: int,
    reporter: Reporter,
) -> tuple[HealRecord, Overrides]:
    """Train the layers around the gaps for `steps` steps of one sequence of `rows.fit`. The model is unchanged
    afterwards.

    `corrected`: the overrides of stage 2, from which training starts. The returned overrides replace them; they are
    empty if the loss on `rows.selection` did not fall clearly. The same seed gives the same bytes on the same machine.
    """
    kept = [layer for layer in range(decoder.count) if layer not in set(removed)]
    trained = layers_around_gaps(kept, removed)
    start, rest = ([layer for layer in kept if (layer < trained[0]) is early] for early in (True, False))
    reporter.total(2 * len(rows.fit) + steps + (1 + min(CHECKS, steps)) * len(rows.selection))
    with ExitStack() as replaced:
        replaced.enter_context(decoder.frozen())
        wanted = _streams(decoder, rows.fit, range(decoder.count), reporter.advance)
        for (layer, name), value in corrected.items():
            replaced.enter_context(decoder.replaced(layer, {name: value.to(decoder.device)}))
        fitted = _streams(decoder, rows.fit, start, reporter.advance)
        watched = _streams(decoder, rows.selection, start)

        def held_out() -> Tensor:
            losses = stream_losses(decoder, watched, rows.selection, rest)
            reporter.advance(len(rows.selection))
            return losses

        before = held_out()
        masters = _Masters(decoder, trained)
        replaced.enter_context(masters.in_place())
        pairs = list(zip(fitted, wanted, strict=True))
        checks, best = _train(decoder, masters, pairs, rest, steps, seed, held_out, reporter)
    helps = best is not None and lowers(before, best[0])
    losses, overrides = best if best is not None and helps else (before, {})
    return HealRecord(
        applied=helps,
        steps=steps,
        rate=RATE,
        loss_before=float(before.mean()),
        loss_after=float(losses.mean()),
        reason="lowest held-out loss" if helps else "it did not clearly lower the held-out loss",
        layers=trained if helps else [],
        checks=checks,
    ), overrides


def _streams(
    decoder: Decoder, ids: Tensor, layers: Sequence[int], row_done: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The stream after `layers` of each sequence, (1, tokens, d)."""
    found: list[Tensor] = []
    for row in ids.split(1):
        found.append(decoder.embed(row))
        with torch.no_grad():
            found[-1] = decoder.run(found[-1], layers)
        row_done()
    return found


def _train(
    decoder: Decoder,
    masters: _Masters,
    rows: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[int],
    steps: int,
    seed: int,
    held_out: Callable[[], Tensor],
    reporter: Reporter,
) -> tuple[list[HealCheck], tuple[Tensor, Overrides] | None]:
    """Train, and return the checks and the best state among them: its held-out losses and weights.

    `rows`: per sequence the pruned model's stream before `layers` and the original's after its last layer, both
    (1, tokens, d). The state is None if no check was finite.
    """
    draw = torch.Generator().manual_seed(seed)
    check_after = {steps * check // CHECKS for check in range(1, CHECKS + 1)}
    checks: list[HealCheck] = []
    best: tuple[Tensor, Overrides] | None = None
    divergences: list[float] = []
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(len(rows), generator=draw).tolist()
        before, wanted = rows[order.pop()]
        with torch.enable_grad():
            reached = decoder.run(before, layers)
        divergence, gradient = divergence_gradient(decoder, reached, wanted)
        reached.backward(gradient)
        masters.step(RATE * rate_at(step, steps))
        divergences.append(divergence)
        reporter.advance()
        if step + 1 not in check_after:
            continue
        losses = held_out()
        loss, mean_divergence = float(losses.mean()), sum(divergences) / len(divergences)
        if not (math.isfinite(loss) and math.isfinite(mean_divergence)):
            break  # the best state so far is kept
        checks.append(HealCheck(step + 1, mean_divergence, loss))
        divergences = []
        if best is None or loss < float(best[0].mean()):
            best = losses, masters.values()
    return checks, best
