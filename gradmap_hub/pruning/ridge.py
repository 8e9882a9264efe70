"""The closed forms of stage 2: one ridge regression, solved from two Gram matrices and folded into a weight.

Notation, for a linear W (d x f) that writes to the residual stream; n calibration tokens:
    z   (n x f)  its input in the pruned model;  m = z W^T its output (n x d)
    H   (n x d)  the original's residual stream after it;  H' the pruned model's;  E = H - H' the drift to undo

Since the residual stream is r + m, replacing m by m P^T, or W by W + D, changes H' by m (P - I)^T or z D^T:

    projection   min_P ||E - m (P - I)^T||^2 + lambda ||P - I||^2      GradMAP stage 2 (arXiv 2602.14649)
    weight       min_D ||E - z D^T||^2 + lambda ||D||^2                more unknowns (d x f), folds as well

Both are ridge regressions with closed forms in the two Gram matrices G = z^T z and C = z^T E alone:
    D^T = (G + lambda I)^-1 C;    (P - I)^T = (W G W^T + lambda I)^-1 W C
With a bias, m = z W^T + b; m^T m and m^T E then also need the sums of z and E over tokens.
The fold is exact and adds nothing to the graph: W <- P W (bias <- P bias) or W <- W + D.
lambda = strength x mean diagonal of the Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gram:
    """Sums over the n = `tokens` calibration tokens for one site, float64: zz (f, f), ze (f, d). `z` (f), `e` (d): the
    sums of z and E. `bias` (d): that of the linear, if it has one."""

    zz: Tensor
    ze: Tensor
    tokens: int
    bias: Tensor | None = None
    z: Tensor | None = None
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RidgeSolution:
    """The solution for one site, float64. Exactly one of `projection` P (d, d) and `delta` D (d, f) is set. `ridge` is
    lambda, `strength` is lambda over the mean diagonal of the Gram matrix."""

    kind: str
    strength: float
    ridge: float
    projection: Tensor | None = None
    delta: Tensor | None = None


def solve(gram: Gram, weight: Tensor, *, kind: str, strength: float) -> RidgeSolution:
    """The ridge solution for one site, in float64. `weight` is W (d, f); `kind` is "weight" or "projection"; `strength`
    is lambda over the mean diagonal of the Gram matrix."""
    if kind == "weight":
        ridge = strength * float(gram.zz.diagonal().mean())
        delta = _ridge(gram.zz, gram.ze, ridge).T  # (d, f)
        return RidgeSolution(kind, strength, ridge, delta=delta)
    w = weight.detach().double()
    mm = w @ gram.zz @ w.T  # (d, d)
    me = w @ gram.ze  # (d, d)
    if gram.bias is not None and gram.z is not None and gram.e is not None:
        cross = torch.outer(w @ gram.z, gram.bias)
        mm = mm + cross + cross.T + gram.tokens * torch.outer(gram.bias, gram.bias)
        me = me + torch.outer(gram.bias, gram.e)
    ridge = strength * float(mm.diagonal().mean())
    projection = torch.eye(len(w), dtype=w.dtype, device=w.device) + _ridge(mm, me, ridge).T
    return RidgeSolution(kind, strength, ridge, projection=projection)


def _ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    ridge = max(ridge, torch.finfo(gram.dtype).tiny)  # all inputs zero: solve to zero instead of failing
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def folded_weight(weight: Tensor, solution: RidgeSolution) -> Tensor:
    """W <- P W or W + D, computed in float64 and returned in float64 (d, f)."""
    w = weight.detach().double()
    if solution.projection is not None:
        return solution.projection.to(w.device) @ w
    assert solution.delta is not None
    return w + solution.delta.to(w.device)


def folded_parameters(linear: nn.Linear, solution: RidgeSolution) -> dict[str, Tensor]:
    """The parameters of a linear with the solution folded in: computed in float64, cast once to their own dtype.

    A projection changes the bias too: P (W z + b) = (P W) z + P b.
    """
    parameters = {"weight": folded_weight(linear.weight, solution).to(linear.weight.dtype).contiguous()}
    if linear.bias is not None and solution.projection is not None:
        bias = solution.projection.to(linear.bias.device) @ linear.bias.detach().double()
        parameters["bias"] = bias.to(linear.bias.dtype)
    return parameters
