"""Graphs written in a precision, their weights beside them, equal ones once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .export import quiet

DATA = "model.onnx.data"
_DATA_FROM, _ALIGNED = 1024, 64  # bytes; smaller tensors stay inside the graph
_BLOCK = 32
_INSIDE = 900_000_000  # bytes of weights that a graph, which ends at 2 GB, may hold itself


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
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = ir.load(file).graph
    given = set(graph.inputs)
    kept = [node.name for node in graph if node.op_type == "MatMul" and given & set(node.inputs)]
    with quiet(), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        if precision == "fp16":
            io = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
            same = [name for name in io if not name.startswith(("past_key_values.", "present."))]
            return convert_float_to_float16(str(file), keep_io_types=same)
        if precision == "int8" and not weights_only:
            quantize_dynamic(
                file,
                Path(folder, file.name),
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=kept,
                use_external_data_format=True,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            return onnx.load(Path(folder, file.name))
        blocks = MatMulNBitsQuantizer(
            str(file),
            bits=int(precision.removeprefix("int")),
            block_size=_BLOCK,
            is_symmetric=True,
            accuracy_level=1,
            nodes_to_exclude=kept,
        )
        blocks.process()
        return blocks.model.model
