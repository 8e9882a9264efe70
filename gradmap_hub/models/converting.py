"""Embedding and head used in another dtype than they are stored in, converted piece by piece as they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Vocabulary entries of the head that are converted at once.
_HEAD_ROWS = 8192


class ConvertingEmbedding(nn.Module):
    """An embedding table used in another dtype than it is stored in: only the looked-up entries are converted."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self._dtype)


class ConvertingHead(nn.Module):
    """A head without bias, used in the dtype of its input: its weight is converted piece by piece."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return _ConvertingLinear.apply(hidden, self.weight)  # pyright: ignore


class _ConvertingLinear(torch.autograd.Function):
    """hidden (..., d) and weight (vocabulary, d) -> (..., vocabulary); the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        output = hidden.new_empty(*hidden.shape[:-1], len(weight))
        start = 0
        for rows in weight.split(_HEAD_ROWS):
            output[..., start : start + len(rows)] = F.linear(hidden, rows.to(hidden.dtype))
            start += len(rows)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        result = grad.new_zeros(*grad.shape[:-1], ctx.weight.shape[1])
        start = 0
        for rows in ctx.weight.split(_HEAD_ROWS):
            result += grad[..., start : start + len(rows)] @ rows.to(grad.dtype)
            start += len(rows)
        return result, None


def must_be_whole(module: nn.Module) -> bool:
    """Whether no class of this file can replace a module: it is neither a plain embedding nor a linear without bias."""
    return type(module) not in (nn.Embedding, nn.Linear) or getattr(module, "bias", None) is not None
