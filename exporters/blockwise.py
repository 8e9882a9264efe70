"""Blockwise weight quantisation: w ~ scale * (code - zero), one float32 scale (and one zero) per block of inputs.

Three ways to choose codes for a weight matrix W (outputs, inputs):
- `nearest`: the range of a block sets its scale; every weight takes the nearest code.
- `search`: of several candidates, the scale (and zero) with the smallest squared error; errors are weighted by E[x^2]
  of their input x, if it is known.
- `gptq`: rounds one input at a time and spreads each error over the inputs not yet rounded, so that W x changes least
  (Frantar et al., 2022, https://arxiv.org/abs/2210.17323); needs H = E[x x^T] (inputs, inputs).

A fourth is for weights that were already quantised to 4 bits, such as those of a GGUF file:
- `regridded`: finds the grid that the weights of each block lie on, w = step * code + offset, where the offset is not a
  multiple of the step. The zero takes the offset's whole steps; the remainder goes into further columns of the matrix,
  one per block, which are multiplied with the sum of the block's inputs.

In all of them, `bits` is 4 or 8, `block` is the number of inputs that share a scale, and `symmetric` leaves out the
zeros. The codes have the layout of ONNX Runtime's MatMulNBits: (outputs, blocks, block * bits / 8), two 4-bit codes per
byte, the first in the low half; without zeros the zero is 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

# Blocks processed at once; bounds the temporaries for a large vocabulary.
_CHUNK = 1 << 17
_SHRINKS = tuple(np.linspace(0.7, 1.0, 13))
_DAMPING = 0.01
_SAMPLE = 4096
# Share of its energy that a matrix on a grid may lose by storage in a 16-bit dtype. A matrix that is not on a grid
# loses 100 times as much in 4 bits.
_ON_GRID = 5e-5


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix. `codes` (outputs, blocks, block), one byte each; `scales` (outputs, blocks); `zeros` like
    scales, or None for the middle of the range."""

    codes: Codes
    scales: Floats
    zeros: Codes | None
    bits: int

    def values(self) -> Floats:
        """The dequantised weights: (outputs, inputs)."""
        zeros = np.float32(2 ** (self.bits - 1)) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        values = (self.codes.astype(np.float32) - zeros) * self.scales[..., None]
        return values.reshape(len(self.codes), -1)

    def packed_codes(self) -> Codes:
        return self.codes if self.bits == 8 else _in_pairs(self.codes)

    def packed_zeros(self) -> Codes | None:
        """The zeros in bytes, two per byte with 4 bits: (outputs, bytes); None if there are none."""
        if self.zeros is None or self.bits == 8:
            return self.zeros
        odd = self.zeros.shape[1] % 2
        return _in_pairs(np.pad(self.zeros, ((0, 0), (0, odd))))


def nearest(weight: Floats, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round every weight to the nearest code. `weight` (outputs, inputs); inputs must be a multiple of `block`."""
    return _by_blocks(weight, bits, block, symmetric, None, (1.0,))


def search(weight: Floats, bits: int, block: int, symmetric: bool, importance: Floats | None = None) -> Blocks:
    """Search the scale (and zero) of each block. `importance` (inputs,): E[x^2]."""
    return _by_blocks(weight, bits, block, symmetric, importance, _SHRINKS)


def gptq(weight: Floats, hessian: npt.NDArray[np.floating], bits: int, block: int, symmetric: bool) -> Blocks:
    """Quantise with GPTQ. `hessian` (inputs, inputs): E[x x^T], or any multiple of it."""
    left = np.array(weight, np.float32)
    outputs, inputs = left.shape
    upper = _inverse_factor(hessian)
    importance = (1.0 / np.square(np.diag(upper))).astype(np.float32)
    count = inputs // block
    codes = np.empty((outputs, count, block), np.uint8)
    scales = np.empty((outputs, count), np.float32)
    zeros = np.empty((outputs, count), np.float32)
    errors = np.empty((outputs, block), np.float32)
    for place in range(count):
        start, end = place * block, (place + 1) * block
        scale, zero = _grid(left[:, start:end], bits, symmetric, importance[None, start:end], _SHRINKS)
        scales[:, place], zeros[:, place] = scale, zero
        for column in range(start, end):
            code = np.clip(np.rint(left[:, column] / scale) + zero, 0, 2**bits - 1)
            codes[:, place, column - start] = code
            error = (left[:, column] - (code - zero) * scale) / upper[column, column]
            left[:, column + 1 : end] -= error[:, None] * upper[column, None, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return Blocks(codes, scales, None if symmetric else zeros.astype(np.uint8), bits)


def regridded(weight: Floats, block: int) -> Blocks | None:
    """4-bit codes of the matrix W' (outputs, inputs + `further_columns`) with W x = W' (x, block sums of x), if
    `weight` lies on a grid of at most 16 values per block; else None."""
    outputs, inputs = weight.shape
    count = inputs // block
    values = np.asarray(weight, np.float32).reshape(-1, block)
    if not _on_grid(values[:: max(1, len(values) // _SAMPLE)]):  # a sample shows quickly that most models have no grid
        return None
    low, step, zero = (np.empty(len(values), np.float32) for _ in range(3))
    codes = np.empty(values.shape, np.uint8)
    lost = 0.0
    for part in _parts(len(values), _CHUNK):
        low[part] = values[part].min(axis=1)
        step[part], error = _grid_step(values[part])
        zero[part] = np.clip(np.rint(-low[part] / step[part]), 0, 15)
        codes[part] = np.clip(np.rint((values[part] - low[part, None]) / step[part, None]), 0, 15)
        lost += float(error.sum())
    if lost > _ON_GRID * float(np.square(values).sum()):
        return None
    columns = np.zeros((outputs, further_columns(inputs, block)), np.float32)
    columns[:, :count] = (low + zero * step).reshape(outputs, count)
    offsets = nearest(columns, 4, block, symmetric=False)
    assert offsets.zeros is not None
    return Blocks(
        np.concatenate([codes.reshape(outputs, count, block), offsets.codes], axis=1),
        np.concatenate([step.reshape(outputs, count), offsets.scales], axis=1),
        np.concatenate([zero.reshape(outputs, count).astype(np.uint8), offsets.zeros], axis=1),
        4,
    )


def _on_grid(values: Floats) -> bool:
    _, error = _grid_step(values)
    return float(error.sum()) <= _ON_GRID * float(np.square(values).sum())


def _grid_step(values: Floats) -> tuple[Floats, Floats]:
    """The best step (blocks,) for at most 16 levels from the minimum to the maximum of each block, and its squared
    error. A block may not use both ends of its grid, so fewer levels are tried too."""
    low = values.min(axis=1, keepdims=True)
    width = values.max(axis=1, keepdims=True) - low
    least = np.full((len(values), 1), np.inf, np.float32)
    step = np.ones((len(values), 1), np.float32)
    for levels in range(15, 3, -1):
        tried = _nonzero(width / np.float32(levels))
        error = np.square(values - low - np.rint((values - low) / tried) * tried).sum(axis=1, keepdims=True)
        better = error < 0.5 * least
        least, step = np.where(better, error, least), np.where(better, tried, step)
    return step[:, 0], least[:, 0]


def further_columns(inputs: int, block: int) -> int:
    """The number of columns that `regridded` adds: one per block, padded to whole blocks."""
    count = inputs // block
    return -(-count // block) * block


def block_sums(inputs: int, block: int) -> Floats:
    """The matrix (inputs, further columns) that computes the block sums of an input."""
    sums = np.zeros((inputs, further_columns(inputs, block)), np.float32)
    sums[np.arange(inputs), np.arange(inputs) // block] = 1
    return sums


def relative_error(weight: Floats, blocks: Blocks, hessian: npt.NDArray[np.floating]) -> float:
    """E|(W - W') x|^2 / E|W x|^2: the share of the output's energy that is lost."""
    difference = weight - blocks.values()
    lost = float(np.sum((difference @ hessian) * difference))
    return lost / max(float(np.sum((weight @ hessian) * weight)), 1e-30)


def _inverse_factor(hessian: npt.NDArray[np.floating]) -> Floats:
    """The upper triangular U with U^T U = (H + damping)^-1, in float32."""
    damped = np.array(hessian, np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: any code is right
    diagonal += _DAMPING * float(diagonal.mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def _by_blocks(
    weight: Floats, bits: int, block: int, symmetric: bool, importance: Floats | None, shrinks: tuple[float, ...]
) -> Blocks:
    outputs, inputs = weight.shape
    count = inputs // block
    codes = np.empty((outputs, count, block), np.uint8)
    scales = np.empty((outputs, count), np.float32)
    zeros = np.empty((outputs, count), np.uint8)
    weights = np.ones(inputs, np.float32) if importance is None else importance + 1e-3 * importance.mean() + 1e-30
    rows = max(1, _CHUNK // count)
    for part in _parts(outputs, rows):
        values = np.asarray(weight[part], np.float32).reshape(-1, block)
        each = np.broadcast_to(weights.reshape(count, block), (len(values) // count, count, block)).reshape(-1, block)
        scale, zero = _grid(values, bits, symmetric, each, shrinks)
        codes[part] = _codes(values, scale, zero, bits).reshape(-1, count, block)
        scales[part], zeros[part] = scale.reshape(-1, count), zero.reshape(-1, count)
    return Blocks(codes, scales, None if symmetric else zeros, bits)


def _parts(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _grid(
    values: Floats, bits: int, symmetric: bool, importance: Floats, shrinks: tuple[float, ...]
) -> tuple[Floats, Floats]:
    """The scale and zero (blocks,) with the smallest weighted squared error for `values` (blocks, block)."""
    candidates = _symmetric_scales(values, bits, shrinks) if symmetric else _ranges(values, bits, shrinks)
    best: tuple[Floats, Floats] | None = None
    least: Floats | None = None
    for scale, zero in candidates:
        error = np.sum(importance * np.square(values - _rounded(values, scale, zero, bits)), axis=1)
        if best is None or least is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        least = np.where(better, error, least)
        best = (np.where(better, scale, best[0]), np.where(better, zero, best[1]))
    assert best is not None and least is not None
    return best if len(shrinks) == 1 else _refined(values, best[0], best[1], bits, importance, least)


def _symmetric_scales(values: Floats, bits: int, shrinks: tuple[float, ...]) -> Iterator[tuple[Floats, Floats]]:
    """Map the value of largest magnitude to an end of the range: for 4 bits the end with one more code; for 8 bits both
    ends are 127, as in GGUF's Q8_0, so that weights from such files are represented exactly."""
    middle = np.float32(2 ** (bits - 1))
    end = middle if bits == 4 else middle - 1
    place = np.argmax(np.abs(values), axis=1)
    extreme = np.take_along_axis(values, place[:, None], axis=1)[:, 0]
    zero = np.full(len(values), middle, np.float32)
    for shrink in shrinks:
        yield _nonzero(extreme * np.float32(-shrink) / end), zero


def _ranges(values: Floats, bits: int, shrinks: tuple[float, ...]) -> Iterator[tuple[Floats, Floats]]:
    top = np.float32(2**bits - 1)
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    for shrink in shrinks:
        scale = _nonzero((high - low) * np.float32(shrink) / top)
        yield scale, np.clip(np.rint(-low * np.float32(shrink) / scale), 0, top).astype(np.float32)


def _refined(
    values: Floats, scale: Floats, zero: Floats, bits: int, importance: Floats, least: Floats
) -> tuple[Floats, Floats]:
    """The least-squares scale for the chosen codes, used where it lowers the error after rounding again."""
    steps = _codes(values, scale, zero, bits).astype(np.float32) - zero[:, None]
    energy = np.sum(importance * np.square(steps), axis=1)
    fitted = np.sum(importance * steps * values, axis=1) / np.where(energy > 0, energy, 1)
    fitted = np.where(fitted == 0, scale, fitted).astype(np.float32)
    error = np.sum(importance * np.square(values - _rounded(values, fitted, zero, bits)), axis=1)
    return np.where(error < least, fitted, scale), zero


def _codes(values: Floats, scale: Floats, zero: Floats, bits: int) -> Codes:
    return np.clip(np.rint(values / scale[:, None]) + zero[:, None], 0, 2**bits - 1).astype(np.uint8)


def _rounded(values: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    codes = np.clip(np.rint(values / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
    return (codes - zero[:, None]) * scale[:, None]


def _nonzero(scale: Floats) -> Floats:
    """Replace zero scales by 1: a block of zeros has no range, and any nonzero scale represents it."""
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _in_pairs(codes: Codes) -> Codes:
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8, copy=False)
