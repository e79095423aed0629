"""Graphs written in a precision, their weights beside them, equal ones once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .export import quiet

PRECISIONS = ("fp32", "fp16", "int8", "int4")
DATA = "model.onnx.data"
_DATA_FROM, _ALIGNED = 1024, 64  # bytes; smaller tensors stay inside the graph
_BLOCK = 32


class GraphWriter:
    """Writes the graphs of one folder in one precision, over one file of weights."""

    def __init__(self, folder: Path, precision: str, *, weights_only: bool = False) -> None:
        self._folder, self._precision, self._weights_only = folder, precision, weights_only
        self._places: dict[bytes, int] = {}

    def write(
        self, name: str, model: ir.Model, check: Callable[[Path], None] | None = None
    ) -> None:
        """Write a float32 graph, which is no longer whole afterwards; `check` is given its file
        before it is made smaller."""
        with tempfile.TemporaryDirectory(dir=self._folder) as beside:
            exact = self._precision == "fp32"
            file = (self._folder if exact else Path(beside)) / name
            _save(model, file, self._places if exact else {})
            if check is not None:
                check(file)
            if not exact:
                small = shrunk(file, self._precision, weights_only=self._weights_only)
                _save(ir.from_proto(small), self._folder / name, self._places)


def _save(model: ir.Model, file: Path, places: dict[bytes, int]) -> None:
    """Write a graph, and its weights into the file beside it, which has those at `places`: digest
    → offset."""
    with (file.parent / DATA).open("ab") as stream:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _DATA_FROM:
                continue
            raw = tensor.tobytes()
            digest = hashlib.sha256(raw).digest()
            if digest not in places:
                stream.write(bytes(-stream.tell() % _ALIGNED))
                places[digest] = stream.tell()
                stream.write(raw)
            place, shape = places[digest], ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                DATA, place, len(raw), tensor.dtype, shape=shape, name=name, base_dir=file.parent
            )
    ir.save(model, file)


def shrunk(file: Path, precision: str, *, weights_only: bool = False) -> Any:
    """The `ModelProto` of a float32 graph in another precision, its weights inside; what adapters
    bring stays float32.

    fp16: caches too, other inputs and outputs stay float32.
    int8: weights in 7 bits per output channel (products of two 8-bit numbers overflow where the
    processor has no VNNI), activations in 8, their range found anew in every run. int4, and int8
    with `weights_only`: weights in blocks of 32, computed in float32.
    """
    graph = ir.load(file).graph
    with quiet():
        if precision == "fp16":
            io = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
            return _float16(
                file, [n for n in io if not n.startswith(("past_key_values.", "present."))]
            )
        given = set(graph.inputs)
        kept = [str(n.name) for n in graph if n.op_type == "MatMul" and given & set(n.inputs)]
        if precision == "int8" and not weights_only:
            return _int8(file, kept)
        return _blocks(file, kept, int(precision.removeprefix("int")))


def _float16(file: Path, kept: list[str]) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(str(file), keep_io_types=kept)


def _int8(file: Path, kept: Sequence[str]) -> Any:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        path = Path(folder) / file.name
        quantize_dynamic(
            file,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=list(kept),
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)


def _blocks(file: Path, kept: Sequence[str], bits: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        str(file),
        bits=bits,
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=1,
        nodes_to_exclude=kept,
    )
    quantizer.process()
    return quantizer.model.model
