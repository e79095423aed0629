"""Weights in blocks with a scale each, 8 or 4 bits a weight, for kernels that multiply in integers.

Graphs of 8 bits have blocks of 16, rounded to nearest. The kernels round what is multiplied with
them to 8 bits in the same blocks: in blocks of 32, as llama.cpp's Q8_0 has them, that costs 1.7
times the divergence. Graphs of 4 bits have blocks of 32 with a zero of their own, scale and zero
chosen for the least error of the larger weights; and the matrices that they hurt most get 8 bits:
the head, values, what attention adds to the residual, the way down into it, and what chooses
experts. Fitted to a text (`fitted.py`) the others lose less, and what attention adds and most ways
down can have 4 bits as well. Embeddings get 8 bits too, and are the head's where the two are tied.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .surgery import Scope, replace, take

BLOCK = {8: 16, 4: 32}  # bits of a graph → weights, and activations, that share a scale
_DOMAIN = "com.microsoft"
_JOINED = 3  # products of one value that become one, as of query, key and value
_INTEGERS = 4  # ONNX Runtime's level of accuracy at which activations are rounded to 8 bits
_LEVELS = np.linspace(11, 17, 13, dtype=np.float32)  # steps that a block's span is tried to have
_AT_ONCE = 1 << 18  # weights that are looked at together
_VALUES, _OUT = {"v_proj", "gate", "router"}, {"o_proj", "out_proj", "dense"}
_DOWN = {"down_proj", "fc2", "c_proj"}
_EDGES = 8  # of the layers one part at each end, whose ways down have 8 bits though fitted
_Array = NDArray[np.float32]
# What a matrix became: `B [out, blocks, bytes]`, the same as `rows [out, bytes]`, `scales [out,
# blocks]` and, of 4 bits, `zero_points`.
Blocks = dict[str, ir.TensorProtocol]


class Fit(NamedTuple):
    """What a matrix of `in` columns is fitted to: `importance [in]` of each, and `upper [in, in]`,
    by which an error in one is made up for by those behind it."""

    importance: _Array
    upper: _Array


class Keep(Protocol):
    """Keeps and returns what became of a matrix. `turned`: it is `[out, in]`."""

    def __call__(
        self, matrix: ir.TensorProtocol, bits: int, block: int, turned: bool, fit: Fit | None = None
    ) -> Blocks: ...


class Product(NamedTuple):
    """Products of one value with constant matrices, `[out, in]` where they are `turned`, which
    become one product in `bits`, its outputs those of the nodes side by side."""

    nodes: list[ir.Node]
    matrices: list[ir.TensorProtocol]
    bits: int
    turned: bool

    @property
    def outputs(self) -> list[int]:
        """How many outputs each of the matrices has."""
        return [each.shape.numpy()[0 if self.turned else 1] for each in self.matrices]

    @property
    def matrix(self) -> ir.TensorProtocol:
        """The matrices side by side."""
        first = self.matrices[0]
        if len(self.matrices) == 1:
            return first
        shape = [*first.shape.numpy()]
        axis = 0 if self.turned else 1
        shape[axis] = sum(self.outputs)
        return ir.LazyTensor(partial(_beside, self.matrices, axis), first.dtype, ir.Shape(shape))


def _beside(matrices: list[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    joined = ir.tensor(np.concatenate([each.numpy() for each in matrices], axis))
    for each in matrices:
        if isinstance(each, ir.ExternalTensor):
            each.release()
    return joined


def quantize(
    model: ir.Model, bits: int, modules: Mapping[str, str], fitted: bool, keep: Keep
) -> None:
    """Give every product of a graph with a constant matrix its weights in `bits`, in place.

    `modules`: node → the module that it computes, where that is known. `fitted`: to a text.
    """
    graph = model.graph
    for product in list(products(graph, bits, modules, fitted)):
        _shrink_product(graph, product, BLOCK[bits], keep)
    for node in list(graph):
        if node.op_type == "Gather" and take(node, 1).name == "input_ids":
            _shrink_embedding(graph, node, BLOCK[bits], keep)
    model.opset_imports.setdefault(_DOMAIN, 1)
    graph.sort()
    RemoveUnusedNodesPass()(model)


def products(
    graph: ir.Graph, bits: int, modules: Mapping[str, str], fitted: bool
) -> Iterator[Product]:
    """What `quantize` makes smaller; products with what an adapter brings are none."""
    hurt = _hurt(modules.values(), fitted)
    found: defaultdict[tuple[ir.Value, int, bool], list[Product]] = defaultdict(list)
    for node in graph:
        value, turned = _source(take(node, 1)) if node.op_type == "MatMul" else (None, False)
        matrix = None if value is None else _constant(value)
        if matrix is None:
            continue
        own = 8 if modules.get(str(node.name)) in hurt else bits
        alike = found[take(node, 0), own, turned]
        if not alike or len(alike[-1].nodes) == _JOINED:
            alike.append(Product([], [], own, turned))
        alike[-1].nodes.append(node)
        alike[-1].matrices.append(matrix)
    for alike in found.values():
        yield from alike


def _shrink_product(graph: ir.Graph, product: Product, block: int, keep: Keep) -> None:
    nodes, bits, matrix = product.nodes, product.bits, product.matrix
    rows, columns = matrix.shape.numpy()[:: -1 if product.turned else 1]
    kept = keep(matrix, bits, block, product.turned)
    kinds = ["B", "scales", *kept.keys() & {"zero_points"}]
    source = "+".join(str(_source(take(node, 1))[0].name) for node in nodes)
    inputs = [take(nodes[0], 0), *_added(graph, f"{source}.{bits}bits", kept, kinds)]
    sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    name = "+".join(str(node.name) for node in nodes)
    scope = Scope(graph, f"{name}/blocks")
    attributes = {**sizes, "accuracy_level": _INTEGERS}
    outputs = [scope.op("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=name)]
    if len(nodes) > 1:
        cut = [outputs[0], scope.constant("outputs", np.array(product.outputs))]
        outputs = [*scope.op_multi_out("Split", cut, {"axis": -1}, num_outputs=len(nodes))]
    for node, output in zip(nodes, outputs, strict=True):
        replace(node.outputs[0], output)
        graph.remove(node, safe=True)


def _shrink_embedding(graph: ir.Graph, node: ir.Node, block: int, keep: Keep) -> None:
    value, turned = _source(take(node, 0))
    table = _constant(value)
    if table is None or table.shape.numpy()[0 if turned else 1] % block:
        return
    kept = keep(table, 8, block, not turned)
    rows, scales = _added(graph, f"{value.name}.8bits", kept, ["rows", "scales"])
    sizes = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    scope = Scope(graph, f"{node.name}/blocks")
    inputs = [rows, take(node, 1), scales]
    output = scope.op("GatherBlockQuantized", inputs, sizes, domain=_DOMAIN, name=node.name)
    replace(node.outputs[0], output)
    graph.remove(node, safe=True)


def _source(value: ir.Value) -> tuple[ir.Value, bool]:
    """What a value is, and whether the graph turns that round first."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose":
        return take(maker, 0), True
    return value, False


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The matrix that a value always is."""
    tensor = None if value.is_graph_input() else value.const_value
    return tensor if tensor is not None and len(tensor.shape) == 2 else None


def _added(graph: ir.Graph, name: str, kept: Blocks, kinds: list[str]) -> list[ir.Value]:
    """Those of `kept` as constants of the graph, each once."""
    for kind in kinds:
        if f"{name}.{kind}" not in graph.initializers:
            graph.register_initializer(ir.val(f"{name}.{kind}", const_value=kept[kind]))
    return [graph.initializers[f"{name}.{kind}"] for kind in kinds]


def _hurt(modules: Iterable[str], fitted: bool) -> set[str]:
    """Those whose matrices 4 bits hurt most."""
    layers = {module: re.search(r"\.(\d+)\.", module) for module in modules}
    count = 1 + max((int(layer[1]) for layer in layers.values() if layer), default=0)
    found = set()
    for module, layer in layers.items():
        kind, number = module.rpartition(".")[2], int(layer[1]) if layer else 0
        edge = min(number, count - 1 - number) < count // _EDGES
        hurt = _VALUES | (set() if fitted else _OUT) | (set() if fitted and not edge else _DOWN)
        if layer is None or kind in hurt:
            found.add(module)
    return found


def blocks_of(
    tensor: ir.TensorProtocol, bits: int, block: int, turned: bool, fit: Fit | None = None
) -> Blocks:
    """What becomes of a float32 matrix `[in, out]`, or `[out, in]` when it is `turned`; in 4 bits
    as `fit` says. The last block of a row is filled with zeros."""
    matrix = tensor.numpy() if turned else tensor.numpy().T
    # What is fitted goes column by column, for which few rows take as long as many.
    count = max(1, (_AT_ONCE if fit is None else 16 * _AT_ONCE) // matrix.shape[1])

    def part(begin: int) -> dict[str, NDArray[np.generic]]:
        rows = np.asarray(matrix[begin : begin + count], np.float32)
        filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
        blocks = filled.reshape(len(rows), -1, block)
        if bits == 8:
            return _eight(blocks)
        scales, zeros, values = scaled(blocks) if fit is None else _fitted(blocks, fit)
        return _four(scales[..., 0], zeros[..., 0], values)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(part, range(0, len(matrix), count)))
    whole = {kind: np.concatenate([each[kind] for each in parts]) for kind in parts[0]}
    whole["rows"] = whole["B"].reshape(len(whole["B"]), -1)
    return {kind: ir.tensor(array) for kind, array in whole.items()}


def _eight(blocks: _Array) -> dict[str, NDArray[np.generic]]:
    """`blocks [rows, blocks, weights]` in 8 bits, 128 standing for zero."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / np.float32(-128)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    values = np.clip(np.rint(blocks * inverse) + 128, 0, 255).astype(np.uint8)
    return {"B": values, "scales": scales[..., 0]}


def scaled(blocks: _Array, importance: float | _Array = 1.0) -> tuple[_Array, _Array, _Array]:
    """Of `blocks [rows, blocks, weights]` in 4 bits the scales and zeros `[rows, blocks, 1]`, and
    the steps from the smallest, 0 to 15.

    For every number of steps that a block's span may have, the scale is the one of least weighted
    squared error, as llama.cpp's k-quants weigh it; but of the whole zero that is stored, and so
    at two thirds of the error of ONNX Runtime's `k_quant`, which rounds the zero afterwards (and
    cuts off blocks that are all of one sign).
    """
    low = np.minimum(blocks.min(-1, keepdims=True), 0)
    span = np.maximum(blocks.max(-1, keepdims=True), 0) - low
    span[span == 0] = 1
    weights = importance * (np.abs(blocks) + np.sqrt((blocks**2).mean(-1, keepdims=True)))
    weighted = weights * blocks
    gain, scales = np.full_like(low, -1), np.ones_like(low)
    zeros, values = np.zeros_like(low), np.zeros_like(blocks)
    for levels in _LEVELS:
        steps = levels / span
        zero = np.clip(np.rint(-low * steps), 0, 15)
        steps_off = np.clip(np.rint(blocks * steps), -zero, 15 - zero)
        match = (weighted * steps_off).sum(-1, keepdims=True)
        size = (weights * steps_off**2).sum(-1, keepdims=True)
        scale = np.divide(match, size, out=np.ones_like(match), where=size > 0)
        better = match * scale > gain  # the error is a constant less this
        for best, tried in (
            (gain, match * scale),
            (scales, scale),
            (zeros, zero),
            (values, steps_off + zero),
        ):
            np.copyto(best, tried, where=better)
    return scales, zeros, values


def _fitted(blocks: _Array, fit: Fit) -> tuple[_Array, _Array, _Array]:
    """The same of a matrix that is fitted, column by column (Frantar et al. 2022, "GPTQ",
    algorithm 1): what rounding a weight leaves is taken from the weights behind it."""
    rows = blocks.reshape(len(blocks), -1).copy()
    block = blocks.shape[-1]
    scales, zeros, values = [], [], np.empty_like(rows)
    for begin in range(0, rows.shape[1], block):
        here, behind = slice(begin, begin + block), slice(begin + block, None)
        scale, zero, _ = scaled(rows[:, None, here], fit.importance[here])
        scales.append(scale)
        zeros.append(zero)
        errors = np.empty((len(rows), block), np.float32)
        upper = fit.upper[here, here]
        for i in range(block):
            column = rows[:, begin + i]
            code = np.clip(np.rint(column / scale[:, 0, 0]) + zero[:, 0, 0], 0, 15)
            values[:, begin + i] = code
            errors[:, i] = (column - (code - zero[:, 0, 0]) * scale[:, 0, 0]) / upper[i, i]
            rows[:, begin + i : begin + block] -= errors[:, i : i + 1] * upper[i, i:]
        rows[:, behind] -= errors @ fit.upper[here, behind]
    return np.concatenate(scales, 1), np.concatenate(zeros, 1), values.reshape(blocks.shape)


def _four(scales: _Array, zeros: _Array, values: _Array) -> dict[str, NDArray[np.generic]]:
    """What `scaled` found as it is stored: two to a byte, the lower half first."""
    codes, zero = values.astype(np.uint8), zeros.astype(np.uint8)
    zero = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    return {
        "B": codes[..., ::2] | codes[..., 1::2] << 4,
        "scales": scales,
        "zero_points": zero[:, ::2] | zero[:, 1::2] << 4,
    }
