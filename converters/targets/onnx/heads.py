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

from ...files.onnx_files import LABELS, head_names
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
