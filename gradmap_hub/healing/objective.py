"""The training objective: the divergence of the next-token distributions of the pruned model from the original's.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        p the original's (teacher), q the pruned model's (student)

Only the teacher's K most likely tokens and the total mass r of all others are stored. By the log-sum inequality, the
sum over the others is at least r (log r - log s), so this lower bound of the KL divergence is minimised:

    sum_{v in top K} p_v (log p_v - log q_v)  +  r (log r - log s)        r = 1 - sum p_v, s = 1 - sum q_v over top K

Its gradient with respect to the logits is q_v - p_v for the K tokens and q_v (1 - r / s) for the others. It is computed
in closed form, CHUNK positions at a time: logits over a large vocabulary are the largest tensor of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Positions whose logits exist at once.
CHUNK = 256
# Lower limit on the mass of the other tokens, so that its logarithm is finite.
_TINY = 1e-6


@dataclass(frozen=True)
class TopK:
    """The K most likely tokens of each position: `indices` int64 and `logprobs` float32, both (positions, K), and
    `rest`, the total probability of all other tokens, (positions,) float32."""

    indices: Tensor
    logprobs: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopK:
        return TopK(self.indices.to(device), self.logprobs.to(device), self.rest.to(device))


def top_k(logits: Tensor, k: int) -> TopK:
    """The `TopK` of `logits` (positions, vocabulary) with K = `k`."""
    logits = logits.float()
    values, indices = logits.topk(k, dim=-1)
    logprobs = values - logits.logsumexp(dim=-1, keepdim=True)
    return TopK(indices, logprobs, (1 - logprobs.exp().sum(dim=-1)).clamp(min=0))


def divergence(
    hidden: Tensor, head: Callable[[Tensor], Tensor], teacher: TopK, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Per-position KL(teacher || student) in nats, (positions,), with all tokens outside the teacher's top K lumped
    together (a lower bound, see the module), and the detached NLL of `labels`, (positions,), or None without labels.

    Args:
        hidden: Student hidden states fed to `head`, (positions, d). Gradients flow to `hidden` only.
        head: Maps hidden states to logits (positions, vocabulary).
        teacher: The original's top-K distribution at the same positions.
        labels: Token ids, (positions,) int64.
    """
    return _Divergence.apply(hidden, head, teacher, labels)  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    """Computes the gradient together with the value, chunk by chunk, so that no logits are kept for the backward
    pass."""

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
                # The gradient of each position separately: `head` treats positions independently.
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

    Works in place on one float32 copy of the logits: a second tensor of that size costs more than the arithmetic."""
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
