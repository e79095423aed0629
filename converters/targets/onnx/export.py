"""From a torch module to an ONNX graph: exported, fused, made smaller, saved and compared."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import TargetError

OPSET = 20
TOLERANCE = 1e-4  # of a float32 graph to the torch module, on outputs of size 1
_BLOCK = 32
DATA = "model.onnx.data"
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules a node comes from
_DATA_FROM, _ALIGNED = 1024, 64  # bytes; smaller tensors stay inside the graph
# Bytes of weights from which on they are not held in the graph, which ends at 2 GB, but beside it
# while it is made: of some there are two forms (a matrix and its transpose).
LARGE = 900_000_000
_OUTSIDE_FROM = 65536  # bytes; the smaller ones are what fusions look at
_BESIDE = ".exported"


def export_graph(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    axes: Mapping[str, Any],
    outputs: Mapping[str, Sequence[str | int | None]],
    out: Path,
    names: Sequence[str] | None = None,
) -> Any:
    """The `ModelProto` of `module` called with `inputs`: argument → tensor, or list of tensors.
    Weights that are too large for it lie below `out` until `save_all`.

    `axes` has the same form, with the free axes of each tensor: axis → name. `outputs`: name → its
    axes' names, None for those of fixed size. `names`: of all input tensors in order, by default
    those of the arguments. Raises `TargetError` when torch cannot export the module.
    """
    known: dict[str, Any] = {}
    try:
        with _quiet(), torch.inference_mode():
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(inputs),
                input_names=list(names or inputs),
                output_names=list(outputs),
                dynamic_shapes=_dims(axes, known),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise TargetError(
            "torch cannot export this model as an ONNX graph",
            found=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            remedy="deploy the merged model instead (`merge`)",
        ) from None
    assert program is not None
    large = sum(p.nbytes for p in module.parameters()) > LARGE
    model = _saved(program, out / _BESIDE) if large else program.model_proto
    for value in model.graph.output:
        for dim, name in zip(value.type.tensor_type.shape.dim, outputs[value.name], strict=True):
            if isinstance(name, str):
                dim.dim_param = name
    for node in model.graph.node:
        # Stack traces of this machine; the names of the modules are needed to find the layers.
        kept = [each for each in node.metadata_props if each.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


def _saved(program: Any, folder: Path) -> Any:
    """The program's graph, its large weights in a file of `folder`."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.glob('*.onnx')))}.onnx"
    program.save(path, external_data=True)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if _outside(tensor) and _length(tensor) < _OUTSIDE_FROM:
            load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _outside(tensor: Any) -> bool:
    from onnx import TensorProto

    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _length(tensor: Any) -> int:
    return int({entry.key: entry.value for entry in tensor.external_data}["length"])


def _dims(axes: Any, known: dict[str, Any]) -> Any:
    """`axes` with torch's dimensions in place of their names, one per name."""
    if isinstance(axes, str):
        return known.setdefault(axes, torch.export.Dim(axes))
    if isinstance(axes, Mapping):
        return {key: _dims(value, known) for key, value in axes.items()}
    return [_dims(value, known) for value in axes]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and its libraries' notices."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def fused(model: Any) -> Any:
    """The graph with BiasGelu and SkipLayerNormalization in place of what they stand for."""
    from onnx import helper
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    options = FusionOptions("bert")
    if any(_outside(tensor) for tensor in model.graph.initializer):
        options.enable_embed_layer_norm = False  # it reads the embeddings
    with _quiet():
        model = optimize_by_fusion(model, "bert", optimization_options=options).model
    if not any(each.domain == "com.microsoft" for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def shrunk(model: Any, precision: str, *, weights_only: bool = False) -> Any:
    """The graph in `precision`; what adapters bring stays float32.

    fp16: caches too, other inputs and outputs stay float32.
    int8: weights in 7 bits per output channel (products of two 8-bit numbers overflow where the
    processor has no VNNI), activations in 8, their range found anew in every run. int4, and int8
    with `weights_only`: weights in blocks of 32, computed in float32.
    """
    if precision == "fp32":
        return model
    if any(_outside(tensor) for tensor in model.graph.initializer):
        raise TargetError(
            "the model is too large for this precision",
            found=precision,
            expected=f"fp32, or at most {LARGE / 1e9:.1f} GB of weights",
        )
    given = {value.name for value in model.graph.input}
    kept = [n.name for n in model.graph.node if n.op_type == "MatMul" and given & set(n.input)]
    if precision == "fp16":
        return _float16(model)
    if precision == "int8" and not weights_only:
        return _int8(model, kept)
    return _blocks(model, kept, int(precision.removeprefix("int")))


def _float16(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    io = [value.name for value in (*model.graph.input, *model.graph.output)]
    kept = [name for name in io if not name.startswith(("past_key_values.", "present."))]
    with _quiet():
        return convert_float_to_float16(model, keep_io_types=kept)


def _int8(model: Any, kept: Sequence[str]) -> Any:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=list(kept),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)


def _blocks(model: Any, kept: Sequence[str], bits: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet():
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=_BLOCK,
            is_symmetric=True,
            accuracy_level=1,
            nodes_to_exclude=kept,
        )
        quantizer.process()
    return quantizer.model.model


def save_all(graphs: Mapping[str, Any], folder: Path, data: str | None) -> None:
    """Write graphs by file name. With `data`, their weights lie in that file, equal ones once;
    else in the graphs, unless they are too large. The graphs are no longer whole afterwards."""
    import onnx

    places: dict[bytes, tuple[int, int]] = {}
    beside = folder / _BESIDE
    data = DATA if beside.exists() else data
    with contextlib.ExitStack() as stack:
        stream = None if data is None else stack.enter_context((folder / data).open("wb"))
        for name, model in graphs.items():
            for node in model.graph.node:
                del node.metadata_props[:]
            for tensor in model.graph.initializer:
                if stream is not None and (_outside(tensor) or len(tensor.raw_data) >= _DATA_FROM):
                    _move(tensor, beside, stream, places)
            onnx.save(model, folder / name)
    if beside.exists():
        shutil.rmtree(beside)


def _move(
    tensor: Any, beside: Path, stream: BinaryIO, places: dict[bytes, tuple[int, int]]
) -> None:
    """Move the data of an initializer into `stream`, unless the same bytes are there already."""
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor

    if _outside(tensor):
        load_external_data_for_tensor(tensor, str(beside))
        del tensor.external_data[:]
    raw = tensor.raw_data
    digest = hashlib.sha256(raw).digest()
    if digest not in places:
        stream.write(bytes(-stream.tell() % _ALIGNED))
        places[digest] = (stream.tell(), len(raw))
        stream.write(raw)
    offset, length = places[digest]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", Path(stream.name).name),
        ("offset", offset),
        ("length", length),
    ):
        tensor.external_data.add(key=key, value=str(value))


def expected(module: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """What `module` computes for `inputs`."""
    with torch.inference_mode():
        found = module(**inputs)
    return found if isinstance(found, tuple) else (found,)


def check_graph(
    model: Any, truth: Sequence[torch.Tensor], inputs: Mapping[str, Any], out: Path
) -> None:
    """Raise `TargetError` when the graph's first outputs for `inputs` are others than `truth`."""
    import onnx
    import onnxruntime

    tensors = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v])]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graph: Any
    if any(_outside(tensor) for tensor in model.graph.initializer):
        graph = out / _BESIDE / "check.onnx"  # with its weights beside it
        onnx.save(model, graph)
    else:
        graph = model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(graph, options)
        names = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()][: len(truth)]
        found = session.run(outputs, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    except Exception as error:
        raise TargetError(
            "ONNX Runtime cannot run the exported graph",
            found=str(error)[:300],
            remedy="deploy the merged model instead (`merge`)",
        ) from None
    for tensor, array in zip(truth, found, strict=True):
        off = float((torch.from_numpy(array) - tensor).abs().max())
        if not off <= TOLERANCE * max(1.0, float(tensor.abs().max())):
            raise TargetError(
                "the exported graph does not compute what the model computes",
                found=f"a difference of {off:.1e}",
                expected=f"at most {TOLERANCE:.0e}",
                remedy="deploy the merged model instead (`merge`)",
            )
