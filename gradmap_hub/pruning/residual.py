"""The output of a layer's attention or MLP to the residual stream, as a linear map whose weight stage 2 solves for.

    plain        s (W z + b)                         s: the family's residual multiplier, usually 1
    experts      s sum_e p_e (W_e z_e + b_e)  = s m  p_e: routing weights. Linear in all W_e and b_e together: with
                                                     W_e <- P W_e and b_e <- P b_e it is s P m, so z = m and W = I
    normed       N(W z) = g (W z) / rms(W z)         with r = rms(W z) of the old W held fixed, g W (z / r)

To undo a drift E of the stream, W <- W + D with z D^T = E / s; through a norm (z / r) D^T = E / g. The first two are
exact. Through a norm it is an approximation, because the norm rescales W z. Therefore `fitted_gain` also solves for the
gain, per dimension and given D; the held-out loss of the real model decides whether both help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradmap_hub.models.architectures import COLUMNS, Architecture
from gradmap_hub.pruning.ridge import RidgeSolution, folded_parameters

MLP, ATTENTION = "mlp", "attention"
# Regularises the division by a gain, relative to the RMS of all gains: else dimensions of small gain would dominate W.
_GAIN_FLOOR = 0.1
# Ridge towards the old gain, relative to the mean square of the norm's output.
_GAIN_RIDGE = 0.01


class Tap:
    """Context manager that records the first input of a module and its output (the first, if it is a tuple) at the
    latest call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.input = self.output = torch.empty(0)

    def __enter__(self) -> Tap:
        def remember(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            self.input, self.output = args[0], output[0] if isinstance(output, tuple) else output

        self._handle = self._module.register_forward_hook(remember)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._handle.remove()


@dataclass(frozen=True, eq=False)
class Writer:
    """A part of one layer that writes to the residual stream. Made by `writer_of` while the layer's weights are loaded.

    Attributes:
        layer: The decoder layer.
        path: Path of `tapped` within the layer.
        tapped: The module with input z and output W z + b; for experts, the module whose output is m.
        added: The module whose output is added to the stream, times `scale`.
        weight: W (d, f); for experts, the identity (d, d).
        bias: b (d,), or None.
        norm: Path of the norm between `tapped` and the stream, or None.
        norm_offset: Added to the norm's weight to give its gain.
        outputs: For experts, name of a parameter within the layer -> its axis of the stream; else None.
    """

    layer: nn.Module
    path: str
    tapped: nn.Module
    added: nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    norm: str | None = None
    norm_offset: float = 0.0
    outputs: Mapping[str, int] | None = None

    @property
    def experts(self) -> bool:
        """Whether this is a mixture of experts, for which only a projection of its output can be solved."""
        return self.outputs is not None

    def equation(self, tap: Tap, drift: Tensor) -> tuple[Tensor, Tensor]:
        """z (tokens, f) and e (tokens, d) of the regression z D^T = e: its solution D makes W + D undo the drift
        (tokens, d). `tap`: recorded on `tapped` for the same tokens."""
        z = tap.output if self.experts else tap.input
        z = z.reshape(-1, z.shape[-1]).to(drift.dtype)
        if self.scale != 1.0:
            drift = drift / self.scale
        if self.norm is not None:
            added = tap.output.reshape(drift.shape).to(drift.dtype)
            z = z / added.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
            gain = self._gain().to(drift.dtype)
            drift = drift * gain / (gain.square() + _GAIN_FLOOR**2 * gain.square().mean())
        return z, drift

    def folded(self, solution: RidgeSolution) -> dict[str, Tensor]:
        """The new parameters by their names within the layer, in the dtypes of the old ones."""
        if self.outputs is None:
            return {f"{self.path}.{name}": value for name, value in self._folded_linear(solution).items()}
        assert solution.projection is not None
        projection = solution.projection
        return {
            name: _projected(self.layer.get_parameter(name).detach(), axis, projection)
            for name, axis in self.outputs.items()
        }

    def fitted_gain(self, cross: Tensor, square: Tensor) -> dict[str, Tensor]:
        """The norm's weight with the least-squares gain per dimension, with a ridge towards the present one. `cross`,
        `square` (d): sums over tokens of a t and a^2, where a is the norm's output and t its target."""
        assert self.norm is not None
        ridge = _GAIN_RIDGE * square.mean()
        factor = (cross + ridge) / (square + ridge).clamp(min=1e-30)
        name = f"{self.norm}.weight"
        weight = self.layer.get_parameter(name).detach()
        gain = factor.to(weight.device) * (weight.double() + self.norm_offset)
        return {name: (gain - self.norm_offset).to(weight.dtype)}

    def _gain(self) -> Tensor:
        assert self.norm is not None
        return self.layer.get_parameter(f"{self.norm}.weight").detach() + self.norm_offset

    def _folded_linear(self, solution: RidgeSolution) -> dict[str, Tensor]:
        linear: Any = self.tapped
        if isinstance(linear, nn.Linear):
            return folded_parameters(linear, solution)
        # transformers' Conv1D: the same map with its weight stored as (f, d).
        upright: Any = SimpleNamespace(weight=linear.weight.T, bias=linear.bias)
        values = folded_parameters(upright, solution)
        return {**values, "weight": values["weight"].T.contiguous()}


def writer_of(layer: nn.Module, architecture: Architecture, part: str) -> Writer:
    """The writer of one part (MLP or ATTENTION) of a layer."""
    row = architecture
    path, norm = (row.mlp_output, row.mlp_norm) if part == MLP else (row.attention_output, row.attention_norm)
    scale = 1.0 if row.residual_multiplier is None else float(getattr(layer, row.residual_multiplier))
    if part == MLP and row.experts is not None and not has_module(layer, path):
        return _mixture(layer, row, scale)
    linear: Any = layer.get_submodule(path)
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
    added = linear if norm is None else layer.get_submodule(norm)
    return Writer(
        layer, path, linear, added, weight.detach(), linear.bias, scale, norm=norm, norm_offset=row.norm_offset
    )


def has_module(layer: nn.Module, path: str) -> bool:
    """Whether a layer has this submodule: in some models the first layers have a dense MLP, the others experts."""
    return any(name == path for name, _ in layer.named_modules())


def _mixture(layer: nn.Module, row: Architecture, scale: float) -> Writer:
    assert row.experts is not None
    outputs: dict[str, int] = {}
    for pattern, axis in row.experts.outputs:
        names = [name for name, _ in layer.named_parameters()]
        found = [name for name in names if any(fnmatch(name, one) for one in pattern.split("|"))]
        if not found:
            raise AttributeError(f"a layer of {row.model_type} has no parameter {pattern}")
        outputs.update(dict.fromkeys(found, axis))
    path = next(path for path in row.experts.block.split("|") if has_module(layer, path))
    block = layer.get_submodule(path)
    name, axis = next(iter(outputs.items()))
    parameter = layer.get_parameter(name)
    identity = torch.eye(parameter.shape[axis], dtype=torch.float64, device=parameter.device)
    return Writer(layer, path, block, block, identity, None, scale, outputs=outputs)


def _projected(value: Tensor, axis: int, projection: Tensor) -> Tensor:
    """P W along the axis of the residual stream, computed in float64, cast to the dtype of W, one expert at a time."""
    projection = projection.to(value.device)
    if value.ndim == 3:
        return torch.stack([_projected(one, axis, projection) for one in value])
    w = value.double()
    return (w @ projection.T if axis == COLUMNS else projection @ w).to(value.dtype).contiguous()
