"""Logits only where they are wanted: of a prompt, those behind its last token.

The head is a large share of a prompt's work (a quarter, where 150,000 words are known to half a
billion parameters), and its logits of a prompt of thousands of tokens are gigabytes. So it gets the
hidden states at `logits_positions` `[batch_size, wanted]`, an input that need not be given: all of
them, when it is empty.
"""

from __future__ import annotations

from typing import Any

from ...files.onnx_files import LOGITS_POSITIONS
from .branches import add_default


def add_positions(graph: Any, head: str) -> None:
    """Let the node `head` of a decoder, which makes logits of hidden states `[batch_size,
    sequence_length, hidden]`, compute those at `logits_positions` only. In place."""
    import numpy as np
    from onnx import helper, numpy_helper

    add_default(graph, LOGITS_POSITIONS, np.zeros((0, 0), np.int64), ["batch_size", "wanted"])
    graph.initializer.append(numpy_helper.from_array(np.array(0), "positions/none"))
    place = next(i for i, node in enumerate(graph.node) if node.name == head)
    hidden, chosen = graph.node[place].input[0], "positions/hidden"
    for node in graph.node:  # the head's branch takes them too
        node.input[:] = [chosen if taken == hidden else taken for taken in node.input]
    nodes = [
        helper.make_node("Size", [LOGITS_POSITIONS], ["positions/count"], "positions/Size"),
        helper.make_node(
            "Equal", ["positions/count", "positions/none"], ["positions/empty"], "positions/Equal"
        ),
        helper.make_node(
            "If",
            ["positions/empty"],
            [chosen],
            "positions/If",
            then_branch=_everywhere(hidden),
            else_branch=_wanted(hidden),
        ),
    ]
    ordered = [*graph.node[:place], *nodes, *graph.node[place:]]
    del graph.node[:]
    graph.node.extend(ordered)


def _everywhere(hidden: str) -> Any:
    from onnx import helper

    output = helper.make_empty_tensor_value_info("positions/all")
    nodes = [helper.make_node("Identity", [hidden], [output.name], "positions/Identity")]
    return helper.make_graph(nodes, "everywhere", [], [output])


def _wanted(hidden: str) -> Any:
    import numpy as np
    from onnx import helper, numpy_helper

    axes = numpy_helper.from_array(np.array([2]), "positions/axes")
    index = "positions/index"
    output = helper.make_empty_tensor_value_info("positions/some")
    nodes = [
        helper.make_node(
            "Unsqueeze", [LOGITS_POSITIONS, axes.name], [index], "positions/Unsqueeze"
        ),
        helper.make_node(
            "GatherND", [hidden, index], [output.name], "positions/GatherND", batch_dims=1
        ),
    ]
    return helper.make_graph(nodes, "wanted", [], [output], initializer=[axes])
