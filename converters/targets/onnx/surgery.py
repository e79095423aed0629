"""Changing an ONNX graph in place.

While a graph is changed its nodes may stand in any order; whoever changed it calls `graph.sort`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Scope(ir.tape.Tape):
    """Adds nodes and constants to a graph, named below one scope.

    A call with a node's kind, inputs and attributes returns its output.
    """

    def __init__(self, graph: ir.Graph, name: str) -> None:
        super().__init__(graph)
        self._name = name

    def __call__(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        name = f"{self._name}/{kind}_{len(self.nodes)}"
        output = self.op(kind, inputs, attributes, name=name)
        output.name = f"{name}/output"
        return output

    def constant(self, name: str, value: NDArray[Any]) -> ir.Value:
        """A constant of this graph."""
        return self.initializer(ir.tensor(value), f"{self._name}/{name}")


def graph_input(
    graph: ir.Graph, name: str, dtype: ir.DataType, axes: Sequence[int | str]
) -> ir.Value:
    """The input of that name, added to the graph where it has none."""
    for value in graph.inputs:
        if value.name == name:
            return value
    graph.inputs.append(ir.val(name, dtype, axes))
    return graph.inputs[-1]


def optional_input(
    graph: ir.Graph, name: str, default: NDArray[Any], axes: Sequence[int | str]
) -> ir.Value:
    """The same of an input that need not be given: `default` is what it is then."""
    value = graph_input(graph, name, ir.DataType.from_numpy(default.dtype), axes)
    if not value.is_initializer():
        value.const_value = ir.tensor(default)
        graph.register_initializer(value)
    return value


def take(node: ir.Node, index: int) -> ir.Value:
    """The node's input at `index`, which is given."""
    value = node.inputs[index]
    assert value is not None
    return value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let all that take `old` take `new` under its name; but not the node that makes `new`."""
    maker = new.producer()
    assert maker is not None
    new.name, old.name = old.name, f"{old.name}/base"
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for i, value in enumerate(maker.inputs):
        if value is new:
            maker.replace_input_with(i, old)
