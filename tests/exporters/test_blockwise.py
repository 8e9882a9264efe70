"""Codes in few bits: what they stand for, how they are packed, and that more work on them loses less."""

from __future__ import annotations

import numpy as np
import pytest

from gradmap_hub.exporters.blockwise import Blocks, block_sums, gptq, nearest, regridded, relative_error, search


@pytest.fixture
def weight() -> np.ndarray:
    """(outputs, inputs) float32, with a row of zeros."""
    draw = np.random.default_rng(0)
    weight = (draw.standard_normal((48, 128)) * draw.gamma(1, 1, (48, 1))).astype(np.float32)
    weight[3] = 0
    return weight


@pytest.fixture
def hessian() -> np.ndarray:
    """Of inputs that depend on each other; one of them never fires."""
    draw = np.random.default_rng(1)
    mixing = draw.standard_normal((128, 128)) / 12 + np.eye(128)
    inputs = (draw.standard_normal((2000, 128)) @ mixing).astype(np.float32)
    inputs[:, 7] = 0
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "step"), [(4, 1 / 7), (8, 1 / 120)])
def test_no_weight_is_further_off_than_its_block_allows(
    weight: np.ndarray, bits: int, step: float, symmetric: bool
) -> None:
    blocks = nearest(weight, bits, 32, symmetric)
    largest = np.abs(weight.reshape(48, 4, 32)).max(axis=2, keepdims=True)
    error = np.abs(blocks.values() - weight).reshape(48, 4, 32)
    assert (error <= step * largest + 1e-6).all()
    assert np.isfinite(blocks.values()).all() and not blocks.values()[3].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32])
def test_more_work_loses_less(weight: np.ndarray, hessian: np.ndarray, block: int, symmetric: bool) -> None:
    lost = [
        relative_error(weight, blocks, hessian)
        for blocks in (
            nearest(weight, 4, block, symmetric),
            search(weight, 4, block, symmetric, np.diag(hessian).copy()),
            gptq(weight, hessian, 4, block, symmetric),
            nearest(weight, 8, block, symmetric),
        )
    ]
    assert lost == sorted(lost, reverse=True) and lost[2] < 0.75 * lost[0]


def test_two_codes_to_a_byte_the_earlier_one_low() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(1, 1, 32) % 16
    blocks = Blocks(codes, np.ones((1, 1), np.float32), np.array([[5]], np.uint8), 4)
    packed = blocks.packed_codes()
    assert packed.shape == (1, 1, 16) and packed[0, 0, 0] == 0x10 and packed[0, 0, 1] == 0x32
    zeros = blocks.packed_zeros()
    assert zeros is not None and zeros.shape == (1, 1) and zeros[0, 0] == 5


def test_a_vocabulary_in_parts_is_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch, weight: np.ndarray) -> None:
    from gradmap_hub.exporters import blockwise

    whole = search(weight, 4, 32, False)
    monkeypatch.setattr(blockwise, "_CHUNK", 20)  # five rows of four blocks
    assert np.array_equal(search(weight, 4, 32, False).values(), whole.values())


def test_weights_on_a_grid_come_back_and_others_are_refused(weight: np.ndarray) -> None:
    draw = np.random.default_rng(2)
    steps, codes = draw.gamma(2, 0.01, (40, 4, 1)), draw.integers(0, 16, (40, 4, 32))
    codes[5, 3] = draw.integers(2, 9, 32)  # a block that uses neither end
    on_grid = (codes * steps - steps * draw.uniform(3, 12, (40, 4, 1))).reshape(40, 128).astype(np.float32)
    halved = (on_grid.view(np.uint32) & 0xFFFF0000).view(np.float32)  # as bfloat16 stores it
    inputs = draw.standard_normal((6, 128)).astype(np.float32)
    augmented = np.concatenate([inputs, inputs @ block_sums(128, 32)], axis=1)
    for stored in (on_grid, halved):
        blocks = regridded(stored, 32)
        assert blocks is not None and blocks.codes.shape == (40, 5, 32)
        lost = np.square(augmented @ blocks.values().T - inputs @ stored.T).sum()
        nearest_lost = np.square(inputs @ (nearest(stored, 4, 32, False).values() - stored).T).sum()
        assert lost < 0.03 * nearest_lost
    assert regridded(weight, 32) is None
