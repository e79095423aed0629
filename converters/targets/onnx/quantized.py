"""Weights in blocks with a scale each, 8 or 4 bits a weight: MatMulNBits.

8 bits round to nearest, in blocks of 16, in which activations are rounded too: blocks of 32, as
llama.cpp's Q8_0 has them, cost 1.7 times the divergence. 4 bits are placed as its k-quants place
them, in blocks of 32, the scale and zero chosen for the least error of the larger weights; and the
matrices that they hurt most get 8: the head, values, and the way down into the residual.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .surgery import Scope, replace, take

_BLOCK = {8: 16, 4: 32}  # weights, and activations, that share a scale
_AT_ONCE = 1 << 18  # weights that are looked at together
_SENSITIVE = {"v_proj", "down_proj", "fc2", "c_proj"}
Array = NDArray[np.generic]
# What a matrix `[in, out]` became, by the name of the input that takes it.
Blocks = dict[str, ir.TensorProtocol]


def quantize(
    model: ir.Model,
    bits: int,
    accuracy_level: int,
    modules: Mapping[str, str],
    put: Callable[[str, Callable[[], dict[str, Array]]], Blocks],
) -> None:
    """Give every product of a graph with a constant matrix its weights in `bits`, in place.

    `modules`: node → the module that it computes, where that is known. `put(name, make)` keeps what
    `make` computes of the matrix of that name, and hands it back.
    """
    graph = model.graph
    sites = [(node, weight) for node in graph if (weight := _matrix(node)) is not None]
    for node, (value, turned) in sites:
        matrix = value.const_value
        assert matrix is not None
        module = modules.get(str(node.name))
        own = 8 if module is not None and _hurts(module) else bits
        name = f"{value.name}.{own}bits"
        rows, columns = matrix.shape.numpy()[:: -1 if turned else 1]
        inputs = [take(node, 0)]
        for kind, kept in put(name, partial(_blocks, matrix, own, turned)).items():
            if f"{name}.{kind}" not in graph.initializers:
                graph.register_initializer(ir.val(f"{name}.{kind}", const_value=kept))
            inputs.append(graph.initializers[f"{name}.{kind}"])
        sizes = {"K": rows, "N": columns, "bits": own, "block_size": _BLOCK[own]}
        product = Scope(graph, f"{node.name}/blocks").op(
            "MatMulNBits",
            inputs,
            {**sizes, "accuracy_level": accuracy_level},
            domain="com.microsoft",
            name=node.name,
        )
        replace(node.outputs[0], product)
        graph.remove(node, safe=True)
    model.opset_imports.setdefault("com.microsoft", 1)
    graph.sort()
    RemoveUnusedNodesPass()(model)


def _matrix(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The constant matrix of a product, and whether the graph turns it round first; None of one
    without, or whose matrix an adapter brings."""
    if node.op_type != "MatMul":
        return None
    value, turned = take(node, 1), False
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose":
        value, turned = take(maker, 0), True
    constant = value.const_value is not None and not value.is_graph_input()
    return (value, turned) if constant and len(value.const_value.shape) == 2 else None  # type: ignore[union-attr]


def _hurts(module: str) -> bool:
    """Whether the matrix of a module is one that 4 bits hurt most."""
    return module.rpartition(".")[2] in _SENSITIVE or re.search(r"\.\d+\.", module) is None


def _blocks(tensor: ir.TensorProtocol, bits: int, turned: bool) -> dict[str, Array]:
    """`B [out, blocks, bytes]`, `scales [out, blocks]` and, of 4 bits, `zero_points`."""
    parts = _parts(tensor.numpy() if turned else tensor.numpy().T, bits)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}


def _parts(matrix: NDArray[np.float32], bits: int) -> list[dict[str, Array]]:
    """`_round` of rows of `[out, in]` in blocks, the last of a row filled with zeros."""
    count = max(1, _AT_ONCE // matrix.shape[1])

    def part(begin: int) -> dict[str, Array]:
        rows = np.asarray(matrix[begin : begin + count], np.float32)
        filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % _BLOCK[bits])))
        return _round(filled.reshape(len(rows), -1, _BLOCK[bits]), bits)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(part, range(0, len(matrix), count)))


def _round(blocks: NDArray[np.float32], bits: int) -> dict[str, Array]:
    """`blocks [rows, blocks, weights]` in so many bits each."""
    if bits == 8:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        scales = largest / np.float32(-128)
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        values = np.clip(np.rint(blocks * inverse) + 128, 0, 255).astype(np.uint8)
        return {"B": values, "scales": scales[..., 0]}
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    shape = blocks.shape
    with np.errstate(all="ignore"):
        values, scales, zeros = quant_tensor_k_quant_cpu(blocks, bits, _BLOCK[bits])
    small = values.astype(np.uint8).reshape(shape)
    zeros = np.pad(zeros.reshape(shape[:2]), ((0, 0), (0, shape[1] % 2)))
    return {
        "B": small[..., ::2] | small[..., 1::2] << 4,
        "scales": scales.astype(np.float32).reshape(shape[:2]),
        "zero_points": zeros[:, ::2] | zeros[:, 1::2] << 4,
    }
