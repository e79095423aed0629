"""Weights in blocks of 4 or 8 bits: any shape, any number of rows at once, near what they were."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.targets.onnx import quantized
from converters.targets.onnx.quantized import blocks_of


def restored(found: dict[str, np.ndarray], bits: int, width: int) -> np.ndarray:
    """The matrix `[out, width]`, as ONNX Runtime's MatMulNBits defines it."""
    codes, zeros = found["B"].astype(int), 128
    if bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = pairs.reshape(*codes.shape[:2], -1)
        both = np.stack([found["zero_points"] & 15, found["zero_points"] >> 4], axis=-1)
        zeros = both.reshape(len(codes), -1)[:, : codes.shape[1], None].astype(int)
    values = (codes - zeros) * found["scales"][..., None]
    return values.reshape(len(codes), -1)[:, :width]


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32]),
    turned=st.booleans(),
    at_once=st.integers(1, 300),
    seed=st.integers(0, 99),
    moved=st.sampled_from([0, 3, -3]),
)
def test_any_blocks(
    shape: tuple[int, int],
    bits: int,
    block: int,
    turned: bool,
    at_once: int,
    seed: int,
    moved: float,
) -> None:
    matrix = np.random.default_rng(seed).normal(moved, 1, shape).astype(np.float32)
    matrix[0] = 0
    tensor = ir.tensor(matrix if turned else np.ascontiguousarray(matrix.T))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_AT_ONCE", at_once)
        found = {k: t.numpy() for k, t in blocks_of(tensor, bits, block, turned).items()}
    assert np.array_equal(found["rows"], found["B"].reshape(shape[0], -1))
    again = restored(found, bits, shape[1])
    assert not again[0].any()
    for begin in range(0, shape[1], block):
        own, other = (each[:, begin : begin + block] for each in (matrix, again))
        low, high = np.minimum(own.min(1), 0), np.maximum(own.max(1), 0)
        step = (high - low) / 15 if bits == 4 else np.abs(own).max(1) / 128
        assert (np.abs(own - other).max(1) <= step * 1.01).all()
