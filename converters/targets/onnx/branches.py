"""LoRA branches in an ONNX graph: the base graph, able to run with any adapter or with none.

Behind every adaptable MatMul, y = x·W becomes y = x·W + (x·A)·B. A `[in, r]` and B `[r, out]` are
graph inputs with a rank symbol of their own per module, and initializers of rank 0 of the same
name, so that a run without adapter is exactly the base. In the batched form the ranks of all
adapters in the batch lie side by side, and a row of the batch computes with those that are its own:

    y[row] = x[row]·W + ((x[row]·A) ∘ (owner == adapter_index[row]))·B
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...files.onnx_files import ADAPTER_INDEX, names
from .adapters import Site
from .surgery import Scope, graph_input, optional_input, replace, take


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
