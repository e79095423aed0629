"""Heads of encoders as graph inputs, so that every adapter can bring its own.

A head is a linear layer outside the encoder itself (`classifier`, `qa_outputs`, a pooler). Its
weight `[in, out]` and bias `[out]` become inputs whose default is the base's own head, or zeros
where the base has none. In the batched form they are stacks, `[n, in, out]` and `[n, out]`, and a
row of the batch takes the one at its `adapter_index`; -1 is the last, the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import TargetError
from ...files.onnx_files import LABELS, head_names, heads_in
from ...model.base import BaseModel
from ...run import Run
from .branches import adapter_index
from .surgery import Scope, optional_input

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """A head's module name, the tensor's `weight [out, in]`, `bias [out]` or None, and whether its
    outputs are the labels, whose number an adapter may change."""

    name: str
    weight: Array
    bias: Array | None
    labels: bool

    def inputs(self) -> dict[str, Array]:
        """Input name → its default."""
        weight, bias = head_names(self.name)
        found = {weight: np.ascontiguousarray(self.weight.T)}
        return found if self.bias is None else {**found, bias: self.bias}


def free_heads(model: ir.Model, heads: Mapping[str, Head], batched: bool) -> None:
    """Make the weight and bias of every head an input with a default; in place.

    `heads`: name of the head's MatMul node, which has three axes → head. Its bias is the other
    side of the Add behind it.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for name, head in heads.items():
        node = nodes[name]
        for input_name, value in head.inputs().items():
            user, side = node, 1
            if input_name != head_names(head.name)[0]:
                user, product_side = next(iter(node.outputs[0].uses()))
                side = 1 - product_side
            last = f"{head.name}.{LABELS}" if head.labels else value.shape[-1]
            axes: list[int | str] = [*value.shape[:-1], last]
            if batched:
                stack = optional_input(
                    graph, input_name, value[None], [f"{head.name}.heads", *axes]
                )
                scope = Scope(graph, f"{input_name}.row")
                taken = scope("Gather", stack, adapter_index(graph), axis=0)
                if user is not node:
                    taken = scope("Unsqueeze", taken, scope.constant("axis", np.array([1])))
            else:
                taken = optional_input(graph, input_name, value, axes)
            user.replace_input_with(side, taken)
    graph.sort()


def head_tensors(
    run: Run, base: BaseModel, shapes: Mapping[str, list[int | str]]
) -> dict[str, Array]:
    """What a run brings for the heads of a graph: input name → array, updates folded in.

    `shapes`: the graph's inputs. Raises `TargetError` for a head of another shape.
    """
    found: dict[str, Array] = {}
    for module in heads_in(shapes):
        for suffix, own in zip(("weight", "bias"), head_names(module), strict=True):
            name = f"{module}.{suffix}"
            tensor = run.replaced.get(name) or (run.embedded_base or {}).get(name)
            update = run.updates[module] if suffix == "weight" and module in run.updates else None
            if tensor is None and update is not None:
                tensor = base.weight(module)
            if tensor is None or own not in shapes:
                continue
            rows = tensor.load().float()
            array = (rows if update is None else update.merge(rows.clone(), 0)).numpy()
            array = array.T.copy() if suffix == "weight" else array
            expected = shapes[own]
            fits = len(expected) == array.ndim and all(
                isinstance(size, str) or size == actual
                for size, actual in zip(expected, array.shape, strict=True)
            )
            if not fits:
                raise TargetError(
                    "the run's head does not fit the graph",
                    file=run.path,
                    tensor=f"{module}.{suffix}",
                    found=list(array.shape),
                    expected=expected,
                )
            found[own] = array
    return found
