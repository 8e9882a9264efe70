"""The closed forms of stage 2: one linear correction, solved from two Gram matrices and folded into a weight.

Notation, for a linear W (d x f) that writes to the residual stream, rows = calibration tokens:
    z   (n x f)  its input in the pruned model;  m = z W^T its output (n x d)
    H   (n x d)  what the residual stream should be behind it;  H' what it is;  E = H - H' the drift to undo

Since the residual stream is r + m, replacing m by m P^T, or W by W + D, changes H' by m (P - I)^T or z D^T:

    projection   min_P ||E - m (P - I)^T||^2 + lambda ||P - I||^2      GradMAP stage 2 (arXiv 2602.14649)
    weight       min_D ||E - z D^T||^2 + lambda ||D||^2                more unknowns (d x f), just as foldable

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
    """Sums over calibration tokens for one site, float64: zz (f, f), ze (f, d); tokens = n. `z` (f), `e` (d) are the
    sums of z and E, kept with the `bias` (d) of the down projection where it has one."""

    zz: Tensor
    ze: Tensor
    tokens: int
    bias: Tensor | None = None
    z: Tensor | None = None
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Correction:
    """What would be folded at a site. Exactly one of `projection` (d, d) and `delta` (d, f) is set; float64."""

    kind: str
    strength: float
    ridge: float
    projection: Tensor | None = None
    delta: Tensor | None = None


def solve(gram: Gram, weight: Tensor, *, kind: str, strength: float) -> Correction:
    """The ridge solution for one site, in float64. `weight` is the down projection W (d, f)."""
    if kind == "weight":
        ridge = strength * float(gram.zz.diagonal().mean())
        delta = _ridge(gram.zz, gram.ze, ridge).T  # (d, f)
        return Correction(kind, strength, ridge, delta=delta)
    w = weight.detach().double()
    mm = w @ gram.zz @ w.T  # (d, d)
    me = w @ gram.ze  # (d, d)
    if gram.bias is not None and gram.z is not None and gram.e is not None:
        cross = torch.outer(w @ gram.z, gram.bias)
        mm = mm + cross + cross.T + gram.tokens * torch.outer(gram.bias, gram.bias)
        me = me + torch.outer(gram.bias, gram.e)
    ridge = strength * float(mm.diagonal().mean())
    projection = torch.eye(len(w), dtype=w.dtype, device=w.device) + _ridge(mm, me, ridge).T
    return Correction(kind, strength, ridge, projection=projection)


def _ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    ridge = max(ridge, torch.finfo(gram.dtype).tiny)  # all inputs zero: nothing to correct, rather than no solution
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def folded_weight(weight: Tensor, correction: Correction) -> Tensor:
    """W <- P W or W + D, computed in float64 and returned in float64 (d, f)."""
    w = weight.detach().double()
    if correction.projection is not None:
        return correction.projection.to(w.device) @ w
    assert correction.delta is not None
    return w + correction.delta.to(w.device)


def corrected_parameters(linear: nn.Linear, correction: Correction) -> dict[str, Tensor]:
    """The parameters of a down projection with the correction folded in, float64 cast once to their own dtype.

    A projection turns the bias too: P (W z + b) = (P W) z + P b.
    """
    parameters = {"weight": folded_weight(linear.weight, correction).to(linear.weight.dtype).contiguous()}
    if linear.bias is not None and correction.projection is not None:
        bias = correction.projection.to(linear.bias.device) @ linear.bias.detach().double()
        parameters["bias"] = bias.to(linear.bias.dtype)
    return parameters
