"""Graphs written in a precision, their weights beside them, equal ones once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...files.onnx_files import DATA
from .export import quiet
from .fitted import fit
from .own_range import own_range
from .quantized import Blocks, Fit, blocks_of, quantize
from .step import step_times

_DATA_FROM, _ALIGNED = 1024, 64  # bytes; smaller tensors stay inside the graph
_TRUTHS = set("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor".split())
_WHOLE = (ir.DataType.INT32, ir.DataType.INT64)
_INSIDE = 900_000_000  # bytes of weights that a graph, which ends at 2 GB, may hold itself


class GraphWriter:
    """Writes the graphs of one folder in one precision, over one file of weights.

    `decodes`: they are of a decoder, whose int8 is of weights in blocks too; `rows`: tokens that
    its 4 bits are fitted to. `times`: of a step of the first such graph, once it is written.
    """

    def __init__(
        self,
        folder: Path,
        precision: str,
        *,
        decodes: bool = False,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._folder, self.precision = folder, precision
        self._rows = rows
        self._blocks = precision == "int4" or (precision == "int8" and decodes)
        self._untimed = decodes
        self.times: dict[str, float] | None = None
        self._places: dict[bytes, int] = {}
        self._kept: dict[tuple[object, ...], Blocks] = {}

    def write(
        self,
        name: str,
        model: ir.Model,
        check: Callable[[Path], None] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Write a float32 graph, or one that is float16 already, which is no longer whole
        afterwards; `check` is given its file before it is made smaller. `modules`: node → the
        module that it computes, for those whose precision depends on it."""
        with tempfile.TemporaryDirectory(dir=self._folder) as beside:
            exact = self.precision == "fp32" or _is_half(model)
            file = (self._folder if exact else Path(beside)) / name
            _save(model, file, self._places if exact else {})
            if check is not None:
                check(file)
            if self._blocks:
                small = ir.load(file)
                bits = int(self.precision.removeprefix("int"))
                if self._rows is not None and not self._kept:
                    fit(file, small, modules or {}, self._rows, self._keep)
                quantize(small, bits, modules or {}, self._rows is not None, self._keep)
                _save(small, self._folder / name, self._places)
                if self._untimed:  # the next graph would want an adapter for every row
                    self._untimed = False
                    self.times = step_times(file, self._folder / name)
            elif not exact:
                small = ir.from_proto(shrunk(file, self.precision))
                if self.precision == "int8":
                    own_range(small)
                _save(small, self._folder / name, self._places)

    def _keep(
        self, matrix: ir.TensorProtocol, bits: int, block: int, turned: bool, fit: Fit | None = None
    ) -> Blocks:
        """What became of a matrix, computed and written once for all graphs."""
        shape = tuple(matrix.shape.numpy())  # zeros of other shapes have the same bytes
        key = (hashlib.sha256(matrix.tobytes()).digest(), shape, bits, block, turned)
        if key not in self._kept:
            data = self._folder / DATA
            found = blocks_of(matrix, bits, block, turned, fit).items()
            self._kept[key] = {kind: _place(each, data, self._places) for kind, each in found}
        if isinstance(matrix, ir.ExternalTensor):
            matrix.release()
        return self._kept[key]


def _is_half(model: ir.Model) -> bool:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return any(tensor is not None and tensor.dtype == ir.DataType.FLOAT16 for tensor in tensors)


def put_inside(file: Path) -> None:
    """Let a graph that is alone hold its weights itself, unless they are too large."""
    import onnx

    data = file.parent / DATA
    if data.stat().st_size < _INSIDE:
        onnx.save(onnx.load(file), file)
        data.unlink()


def _save(model: ir.Model, file: Path, places: dict[bytes, int]) -> None:
    """Write a graph, and its weights into the file beside it, which has those at `places`: digest
    → offset."""
    data = file.parent / DATA
    data.touch()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        outside = isinstance(tensor, ir.ExternalTensor) and tensor.path != str(data)
        if tensor is None or (tensor.nbytes < _DATA_FROM and not outside):
            continue
        if tensor.nbytes < _DATA_FROM:
            value.const_value = ir.tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
        elif outside or not isinstance(tensor, ir.ExternalTensor):
            value.const_value = _place(tensor, data, places)
    ir.save(model, file)


def _place(tensor: ir.TensorProtocol, data: Path, places: dict[bytes, int]) -> ir.ExternalTensor:
    """The tensor in the file of weights, put at its end unless an equal one is there."""
    raw = tensor.tobytes()
    digest = hashlib.sha256(raw).digest()
    if digest not in places:
        with data.open("ab") as stream:
            stream.write(bytes(-stream.tell() % _ALIGNED))
            places[digest] = stream.tell()
            stream.write(raw)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        DATA,
        places[digest],
        len(raw),
        tensor.dtype,
        shape=shape,
        name=tensor.name or "",
        base_dir=data.parent,
    )


def shrunk(file: Path, precision: str) -> Any:
    """The `ModelProto` of a float32 graph in another precision, its weights inside; what adapters
    bring stays float32.

    fp16: caches too, other inputs and outputs stay float32, and so do angles, which grow with the
    position, and the buckets of distances, which rounding would exchange. int8: weights in 7 bits
    per output channel (products of two 8-bit numbers overflow where the processor has no VNNI),
    activations in 8, of a range that `own_range` makes every token's own.
    """
    import onnx

    with quiet():
        from onnxruntime.quantization import quantize_dynamic
        from onnxruntime.transformers.float16 import (
            DEFAULT_OP_BLOCK_LIST,
            convert_float_to_float16,
        )

    graph = ir.load(file).graph
    with quiet(), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        if precision == "fp16":
            io = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
            return convert_float_to_float16(
                str(file),
                keep_io_types=[n for n in io if not n.startswith(("past_key_values.", "present."))],
                node_block_list=_positions(graph),
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Cos", "Sin"],
            )
        given = set(graph.inputs)
        products = [node for node in graph if node.op_type == "MatMul"]
        quantize_dynamic(
            file,
            Path(folder, file.name),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=[node.name for node in products if given & set(node.inputs)],
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(Path(folder, file.name))


def _positions(graph: ir.Graph) -> list[str]:
    """The nodes that make what cosines and sines are taken of, and what becomes whole numbers, as
    the buckets of distances do."""
    makers = {node for node in graph if node.op_type in ("Cos", "Sin") or _is_cut(node)}
    waiting = list(makers)
    while waiting:
        for value in waiting.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is not None and maker not in makers:
                makers.add(maker)
                waiting.append(maker)
    return [str(node.name) for node in makers]


def _is_cut(node: ir.Node) -> bool:
    """Whether `node` makes whole numbers of others, and not of what is true."""
    if node.op_type != "Cast" or node.attributes["to"].as_int() not in _WHOLE:
        return False
    (value,) = node.inputs
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type not in _TRUTHS
