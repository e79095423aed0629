"""LoRA branches in an ONNX graph: the base graph, able to run with any adapter or with none.

Behind every adaptable MatMul, y = x·W becomes y = x·W + (x·A)·B. A `[in, r]` and B `[r, out]` are
graph inputs with a rank symbol of their own per module, and initializers of rank 0 of the same
name, so that a run without adapter is exactly the base. In the batched form the ranks of all
adapters in the batch lie side by side, and a row of the batch computes with those that are its own:

    y[row] = x[row]·W + ((x[row]·A) ∘ (owner == adapter_index[row]))·B
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...files.onnx_files import ADAPTER_INDEX, names
from .surgery import Scope, graph_input, optional_input, replace, take


@dataclass(frozen=True)
class Site:
    """One MatMul that an update can be added to: its node (empty once the branch is there), the
    module it computes, `in` and `out` features."""

    node: str
    name: str
    in_features: int
    out_features: int


def add_branches(model: ir.Model, sites: Iterable[Site], batched: bool) -> None:
    """Add a branch behind every site, in place; those of one module take the same A and B.
    Branches compute in float32, in a float16 graph too."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    half = any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values())
    if batched:
        index = adapter_index(graph)
        shared = Scope(graph, "lora")
        axes = shared.constant("axes", np.array([1, 2]))
        zero = shared.constant("zero", np.array(0, np.float32))
    used: Counter[str] = Counter()
    for site in sites:
        a, b, owner = names(site.name)
        rank, width, height = f"{site.name}.rank", site.in_features, site.out_features
        used[site.name] += 1
        again = f"#{used[site.name]}" if used[site.name] > 1 else ""
        branch = Scope(graph, f"/{site.name}{again}/lora")
        hidden = take(nodes[site.node], 0)
        if half:
            hidden = branch("Cast", hidden, to=ir.DataType.FLOAT)
        none = np.zeros((width, 0), np.float32)
        hidden = branch("MatMul", hidden, optional_input(graph, a, none, [width, rank]))
        if batched:
            owners = optional_input(graph, owner, np.zeros(0, np.int64), [rank])
            own = branch("Equal", branch("Unsqueeze", index, axes), owners)
            # No product with 0, which an adapter that overflows would make NaN in others' rows.
            hidden = branch("Where", own, hidden, zero)
        none = np.zeros((0, height), np.float32)
        update = branch("MatMul", hidden, optional_input(graph, b, none, [rank, height]))
        if half:
            update = branch("Cast", update, to=ir.DataType.FLOAT16)
        output = nodes[site.node].outputs[0]
        replace(output, branch("Add", output, update))
    graph.sort()


def adapter_index(graph: ir.Graph) -> ir.Value:
    """The input that says for every row of the batch which adapter is its own."""
    return graph_input(graph, ADAPTER_INDEX, ir.DataType.INT64, ["batch_size"])


def input_shapes(file: Path) -> dict[str, list[int | str]]:
    """The axes of every input of a graph, a symbol's name where the size is free."""
    return {
        str(value.name): [
            axis if isinstance(axis, int) else str(axis.value) for axis in value.shape
        ]
        for value in ir.load(file).graph.inputs
        if value.shape is not None
    }


def sites_in(shapes: Mapping[str, list[int | str]]) -> dict[str, Site]:
    """The sites of a graph that has its branches already, by name, from its inputs' `shapes`."""
    found = {}
    for name in (n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")):
        a, b, _ = names(name)
        found[name] = Site("", name, int(shapes[a][0]), int(shapes[b][1]))
    return found
