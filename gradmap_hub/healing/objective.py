"""The training objective: the divergence of the next-token distributions of the pruned model from the original's.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        p the original's (teacher), q the pruned model's (student)

The teacher is known by its K most likely tokens and the mass of all others. The sum over the others is bounded from
below by that of their total (the log-sum inequality), which is what is minimised:

    sum_{v in top K} p_v (log p_v - log q_v)  +  r (log r - log s)        r = 1 - sum p_v, s = 1 - sum q_v over top K

Its gradient with respect to the logits is q_v - p_v for the K tokens and q_v (1 - r / s) for the others. It is computed
in closed form for a few positions at a time: logits over a large vocabulary are the largest tensor of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Positions whose logits exist at once.
CHUNK = 256
# Least mass of the other tokens, for its logarithm.
_TINY = 1e-6


@dataclass(frozen=True)
class TopK:
    """A distribution per position: `indices` int64 and `logprobs` float32, both (positions, K), and `rest`, the mass
    of all other tokens, (positions) float32."""

    indices: Tensor
    logprobs: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopK:
        return TopK(self.indices.to(device), self.logprobs.to(device), self.rest.to(device))


def top_k(logits: Tensor, k: int) -> TopK:
    """The `k` most likely tokens of each position of `logits` (positions, vocabulary)."""
    logits = logits.float()
    values, indices = logits.topk(k, dim=-1)
    logprobs = values - logits.logsumexp(dim=-1, keepdim=True)
    return TopK(indices, logprobs, (1 - logprobs.exp().sum(dim=-1)).clamp(min=0))


def divergence(
    hidden: Tensor, head: Callable[[Tensor], Tensor], teacher: TopK, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Divergence of each position in nats, (positions), and without gradient the NLL of `labels` (positions).

    Args:
        hidden: The student's hidden states before `head`, (positions, d); the sum of the divergences may be
            differentiated with respect to it. Parameters of `head` get no gradient.
        head: From hidden states to logits (positions, vocabulary).
        labels: Tokens whose negative log-likelihood is wanted.
    """
    return _Divergence.apply(hidden, head, teacher, labels)  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value, chunk by chunk, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, teacher: TopK, labels: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[0]
        values: list[Tensor] = []
        losses: list[Tensor] = []
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            inputs = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(inputs)
            value, loss, direction = _chunk(logits.detach(), teacher, labels, part)
            values.append(value)
            losses.append(loss)
            if gradient is not None:
                # d/dx of every position by itself: positions do not depend on each other here.
                [gradient[part]] = torch.autograd.grad(logits, inputs, direction.to(logits.dtype))
        ctx.save_for_backward(gradient)
        found = torch.cat(losses) if labels is not None else None
        if found is not None:
            ctx.mark_non_differentiable(found)
        return torch.cat(values), found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        [gradient] = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None


def _chunk(logits: Tensor, teacher: TopK, labels: Tensor | None, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence and NLL of each position (zeros without `labels`), and the gradient with respect to the logits.

    In place in one float32 tensor: a further one of its size costs more than the arithmetic."""
    student = logits.to(torch.float32, copy=True)
    student -= student.logsumexp(dim=-1, keepdim=True)
    indices, logprobs, rest = teacher.indices[part], teacher.logprobs[part], teacher.rest[part]
    chosen = student.gather(-1, indices)
    loss = torch.zeros(len(student), device=student.device)
    if labels is not None:
        loss = -student.gather(-1, labels[part, None])[:, 0]
    probabilities = logprobs.exp()
    others = (1 - chosen.exp().sum(dim=-1)).clamp(min=_TINY)
    value = (probabilities * (logprobs - chosen)).sum(dim=-1)
    value += rest * (rest.clamp(min=_TINY).log() - others.log())
    direction = student.exp_()
    direction *= (1 - rest / others)[:, None]
    direction.scatter_(-1, indices, chosen.exp() - probabilities)
    return value, loss, direction
