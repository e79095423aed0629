"""Weights in blocks of 4 or 8 bits: any shape, any number of rows at once, near what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.targets.onnx import quantized
from converters.targets.onnx.graph_file import GraphWriter
from converters.targets.onnx.quantized import blocks_of


def restored(found: dict[str, np.ndarray], bits: int, width: int) -> np.ndarray:
    """The matrix `[out, width]`, as ONNX Runtime's MatMulNBits defines it."""
    codes, zeros = found["B"].astype(int), np.array(128)
    if bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = pairs.reshape(*codes.shape[:2], -1)
        both = np.stack([found["zero_points"] & 15, found["zero_points"] >> 4], axis=-1)
        zeros = both.reshape(len(codes), -1)[:, : codes.shape[1], None].astype(int)
    values: np.ndarray = (codes - zeros) * found["scales"][..., None]
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
    padding = ((0, 0), (0, -shape[1] % block))
    own, other = (np.pad(m, padding).reshape(shape[0], -1, block) for m in (matrix, again))
    error, ends = other - own, (own.min(-1, initial=0), own.max(-1, initial=0))
    if bits == 8:
        assert (np.abs(error).max(-1) <= np.abs(own).max(-1) / 128 * 1.01).all()
    else:  # as good as dividing the span evenly, at least
        assert (found["scales"][0] == 1).all()
        span = np.where(ends[1] > ends[0], ends[1] - ends[0], 1)[..., None]
        zero = np.rint(-ends[0][..., None] / span * 15)
        plain = (np.clip(np.rint(own / span * 15) + zero, 0, 15) - zero) * span / 15
        weights = np.abs(own) + np.sqrt((own**2).mean(-1, keepdims=True))
        squares = [(weights * each**2).sum(-1) for each in (error, plain - own)]
        assert (squares[0] <= squares[1] * 1.001 + 1e-9).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_equal_bytes_of_other_shapes(precision: str, tmp_path: Path) -> None:
    """Matrices of zeros, as pruning leaves them."""
    writer, bits = GraphWriter(tmp_path, precision, decodes=True), int(precision[3:])
    for shape in ((32, 64), (64, 32), (32, 64)):
        found = writer._keep(ir.tensor(np.zeros(shape, np.float32)), bits, 32, True)
        assert found["scales"].shape.numpy() == (shape[0], shape[1] // 32)
        assert found["B"].shape.numpy()[0] == shape[0]
