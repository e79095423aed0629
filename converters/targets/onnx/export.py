"""From a torch module to an ONNX graph: exported, fused, and compared."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from ...errors import TargetError
from .decomposition import onnx_program

OPSET = 20
TOLERANCE = 1e-4  # of a float32 graph to the torch module, on outputs of size 1
_SEEN = 1 << 20  # bytes; fusions look at no weights beyond
Axes = tuple[str | None, ...]  # of a tensor: their names, None where the size is fixed


@dataclass(frozen=True)
class Part:
    """One graph to be: the module, its inputs for a number of rows, and the names of both sides.

    `example`: rows → argument → tensor, or list of tensors. `axes` has the form of the arguments.
    `outputs`: name → axes. `names`: of all input tensors in order, by default the arguments'.
    """

    module: torch.nn.Module
    example: Callable[[int], dict[str, Any]]
    axes: Mapping[str, Axes | list[Axes]]
    outputs: Mapping[str, Axes]
    names: Sequence[str] | None = None

    def export(self) -> ir.Model:
        """The graph, over the weights of the module. Raises `TargetError` when torch cannot
        export the module."""
        inputs = self.example(2)
        try:
            with quiet(), torch.inference_mode():
                program = onnx_program(
                    self.module,
                    kwargs=inputs,
                    input_names=list(self.names or inputs),
                    output_names=list(self.outputs),
                    dynamic_shapes=_dims(self.axes, {}),
                    dynamo=True,
                    opset_version=OPSET,
                    verbose=False,
                )
        except ModuleNotFoundError:
            raise
        except Exception as error:
            found = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise self._refused(found) from None
        assert program is not None
        model: ir.Model = program.model
        if len(model.graph.outputs) != len(self.outputs):  # GPT-Neo's, where it leaves some out
            raise self._refused(f"{len(model.graph.outputs)} of {len(self.outputs)} outputs")
        for value, names in zip(model.graph.outputs, self.outputs.values(), strict=True):
            assert value.shape is not None
            value.shape = ir.Shape(n or d for n, d in zip(names, value.shape, strict=True))
        return model

    def _refused(self, found: str) -> TargetError:
        return TargetError(
            "torch cannot export this model as an ONNX graph",
            found=found,
            remedy="deploy the merged model instead (`merge`)",
        )

    def check(self, file: Path) -> None:
        """Raise `TargetError` when the graph computes something else than the module."""
        inputs = self.example(3)
        with computing():
            found = self.module(**inputs)
        check_graph(file, found if isinstance(found, tuple) else (found,), inputs)


def _dims(axes: Any, known: dict[str, Any]) -> Any:
    """`axes` with torch's dimensions in place of their names, one per name."""
    if isinstance(axes, Mapping):
        return {key: _dims(value, known) for key, value in axes.items()}
    if isinstance(axes, list):
        return [_dims(value, known) for value in axes]
    return {i: known.setdefault(n, torch.export.Dim(n)) for i, n in enumerate(axes) if n}


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Raise `TargetError` where the torch module itself fails, as it does where its context is
    shorter than the few tokens that it is asked."""
    try:
        with torch.inference_mode():
            yield
    except Exception as error:
        raise TargetError(
            "the model does not compute a short text of any tokens, with which its graph would be "
            "compared",
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="deploy the merged model instead (`merge`)",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's and its libraries' notices, then or later: one turns them on."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers
        root.setLevel(level)


def fused(model: ir.Model) -> ir.Model:
    """The graph with BiasGelu and SkipLayerNormalization in place of what they stand for, without
    what nothing takes, and without traces of this machine. The one given is no longer whole."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # it reads the embeddings
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    # It fails at a norm without bias.
    options.enable_skip_layer_norm = all(len(norm.inputs) == 3 for norm in norms)
    # Behind a bias it takes the tanh form of Gelu for the exact one.
    gelus = [node for node in model.graph if node.op_type == "Gelu"]
    exact = (each.attributes.get_string("approximate", "none") == "none" for each in gelus)
    options.enable_bias_gelu = all(exact)
    large = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SEEN:
            large[name] = tensor
            value.const_value = ir.ExternalTensor(
                "", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    with quiet(), contextlib.redirect_stdout(None), contextlib.suppress(Exception):
        # It leaves some graphs in an order that is none, and fails at constants of other shapes
        # than it knows: those stay as they are.
        proto = optimize_by_fusion(ir.to_proto(model), "bert", optimization_options=options).model
        del proto.graph.value_info[:]  # some are others by now
        model = ir.from_proto(proto)
    for name, value in model.graph.initializers.items():
        value.const_value = large.get(name, value.const_value)
    model.opset_imports.setdefault("com.microsoft", 1)
    return model


def check_graph(file: Path, truth: Sequence[torch.Tensor], inputs: Mapping[str, Any]) -> None:
    """Raise `TargetError` when the graph's first outputs for `inputs` are others than `truth`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options)
        names = [value.name for value in session.get_inputs()]
        optional = {v.name for v in session.get_overridable_initializers()} & inputs.keys()
        feeds = {name: inputs[name].numpy() for name in optional}
        needed = [value for name, value in inputs.items() if name not in optional]
        tensors = [t for v in needed for t in (v if isinstance(v, list) else [v])]
        feeds |= {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        outputs = [value.name for value in session.get_outputs()][: len(truth)]
        found = session.run(outputs, feeds)
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
