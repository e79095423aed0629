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

ADAPTER_INDEX = "adapter_index"
NO_ADAPTER = -1


@dataclass(frozen=True)
class Site:
    """One MatMul that an update can be added to: its node (empty once the branch is there), the
    module it computes, `in` and `out` features."""

    node: str
    name: str
    in_features: int
    out_features: int


def names(site: str) -> tuple[str, str, str]:
    """The graph inputs of one site: A `[in, r]`, B `[r, out]`, and the owner of each rank."""
    return f"{site}.lora_A", f"{site}.lora_B", f"{site}.lora_owner"


def add_branches(model: Any, sites: Iterable[Site], batched: bool) -> None:
    """Add a branch behind every site of the `ModelProto`, in place."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    by_name = {node.name: node for node in graph.node}
    added: dict[str, list[Any]] = {}
    if batched:
        _input(graph, ADAPTER_INDEX, TensorProto.INT64, ["batch_size"])
        graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "lora/axes"))
    for site in sites:
        node = by_name[site.node]
        a, b, owner = names(site.name)
        rank = f"{site.name}.rank"
        _input(graph, a, TensorProto.FLOAT, [site.in_features, rank])
        _input(graph, b, TensorProto.FLOAT, [rank, site.out_features])
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.zeros((site.in_features, 0), np.float32), a),
                numpy_helper.from_array(np.zeros((0, site.out_features), np.float32), b),
            ]
        )
        scope, output = f"/{site.name}/lora", node.output[0]
        node.output[0] = f"{output}/base"
        nodes = [helper.make_node("MatMul", [node.input[0], a], [f"{scope}/A"], f"{scope}/A")]
        hidden = f"{scope}/A"
        if batched:
            _input(graph, owner, TensorProto.INT64, [rank])
            graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.int64), owner))
            index = f"{scope}/index"
            nodes += [
                helper.make_node("Unsqueeze", [ADAPTER_INDEX, "lora/axes"], [index], index),
                helper.make_node("Equal", [index, owner], [f"{scope}/own"], f"{scope}/own"),
                helper.make_node(
                    "Cast", [f"{scope}/own"], [f"{scope}/mask"], f"{scope}/mask", to=1
                ),
                helper.make_node(
                    "Mul", [hidden, f"{scope}/mask"], [f"{scope}/masked"], f"{scope}/masked"
                ),
            ]
            hidden = f"{scope}/masked"
        nodes += [
            helper.make_node("MatMul", [hidden, b], [f"{scope}/B"], f"{scope}/B"),
            helper.make_node("Add", [node.output[0], f"{scope}/B"], [output], f"{scope}/Add"),
        ]
        added[site.node] = nodes
    ordered = [n for node in graph.node for n in (node, *added.get(node.name, ()))]
    del graph.node[:]
    graph.node.extend(ordered)


def _input(graph: Any, name: str, kind: int, shape: list[int | str]) -> None:
    from onnx import helper

    graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def sites_in(graph: Any) -> dict[str, Site]:
    """The sites of a graph that has its branches already, by name."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    found = {}
    for name in (n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")):
        a, b, _ = names(name)
        found[name] = Site("", name, shapes[a][0], shapes[b][1])
    return found
