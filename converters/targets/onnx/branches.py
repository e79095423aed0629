"""LoRA branches in an ONNX graph: the base graph, able to run with any adapter or with none.

Behind every adaptable MatMul, y = x·W becomes y = x·W + (x·A)·B. A `[in, r]` and B `[r, out]` are
graph inputs with a rank symbol of their own per module, and initializers of rank 0 of the same
name, so that a run without adapter is exactly the base. In the batched form the ranks of all
adapters in the batch lie side by side, and a row of the batch computes with those that are its own:

    y[row] = x[row]·W + ((x[row]·A) ∘ (owner == adapter_index[row]))·B
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...files.onnx_files import ADAPTER_INDEX, names


@dataclass(frozen=True)
class Site:
    """One MatMul that an update can be added to: its node (empty once the branch is there), the
    module it computes, `in` and `out` features."""

    node: str
    name: str
    in_features: int
    out_features: int


def add_branches(model: Any, sites: Iterable[Site], batched: bool) -> None:
    """Add a branch behind every site of the `ModelProto`, in place. Branches compute in float32,
    in a float16 graph too."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    by_name = {node.name: node for node in graph.node}
    half = any(t.data_type == TensorProto.FLOAT16 for t in graph.initializer)
    added: dict[str, list[Any]] = {}
    if batched:
        _input(graph, ADAPTER_INDEX, TensorProto.INT64, ["batch_size"])
        graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "lora/axes"))
        graph.initializer.append(numpy_helper.from_array(np.float32(0), "lora/zero"))
    for site in sites:
        node = by_name[site.node]
        a, b, owner = names(site.name)
        rank = f"{site.name}.rank"
        add_default(graph, a, np.zeros((site.in_features, 0), np.float32), [site.in_features, rank])
        add_default(
            graph, b, np.zeros((0, site.out_features), np.float32), [rank, site.out_features]
        )
        branch = _Branch(f"/{site.name}/lora")
        hidden = branch.cast(node.input[0], TensorProto.FLOAT) if half else node.input[0]
        hidden = branch("MatMul", hidden, a)
        if batched:
            add_default(graph, owner, np.zeros(0, np.int64), [rank])
            own = branch("Equal", branch("Unsqueeze", ADAPTER_INDEX, "lora/axes"), owner)
            # No product with 0, which an adapter that overflows would make NaN in others' rows.
            hidden = branch("Where", own, hidden, "lora/zero")
        update = branch("MatMul", hidden, b)
        update = branch.cast(update, TensorProto.FLOAT16) if half else update
        output = node.output[0]
        node.output[0] = f"{output}/base"
        branch("Add", node.output[0], update, output=output)
        added[site.node] = branch.nodes
    ordered = [n for node in graph.node for n in (node, *added.get(node.name, ()))]
    del graph.node[:]
    graph.node.extend(ordered)


class _Branch:
    """Makes nodes below one scope; each call returns the name of the node's output."""

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self.nodes: list[Any] = []

    def __call__(
        self, kind: str, *inputs: str, output: str | None = None, **attributes: Any
    ) -> str:
        from onnx import helper

        name = f"{self._scope}/{kind}_{len(self.nodes)}"
        output = output or f"{name}/output"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def cast(self, value: str, to: int) -> str:
        return self("Cast", value, to=to)


def add_default(graph: Any, name: str, value: Any, shape: list[int | str]) -> None:
    """An input that need not be given: `value` is what it is then."""
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    _input(graph, name, kind, shape)
    graph.initializer.append(numpy_helper.from_array(value, name))


def _input(graph: Any, name: str, kind: int, shape: list[int | str]) -> None:
    from onnx import helper

    graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def input_shapes(graph: Any) -> dict[str, list[int | str]]:
    """The axes of every input, a symbol's name where the size is free."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }


def sites_in(graph: Any) -> dict[str, Site]:
    """The sites of a graph that has its branches already, by name."""
    shapes = input_shapes(graph)
    found = {}
    for name in (n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")):
        a, b, _ = names(name)
        found[name] = Site("", name, int(shapes[a][0]), int(shapes[b][1]))
    return found
