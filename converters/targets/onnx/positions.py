"""Logits only where they are wanted: of a prompt, those behind its last token.

The head is a large share of a prompt's work (a quarter, where 150,000 words are known to half a
billion parameters), and its logits of a prompt of thousands of tokens are gigabytes. So it gets the
hidden states at `logits_positions` `[batch_size, wanted]`, an input that need not be given: all of
them, when it is empty.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...files.onnx_files import LOGITS_POSITIONS
from .surgery import Scope, optional_input, take


def add_positions(model: ir.Model, head: str) -> None:
    """Let the node `head` of a decoder, which makes logits of hidden states `[batch_size,
    sequence_length, hidden]`, compute those at `logits_positions` only. In place."""
    graph, none = model.graph, np.zeros((0, 0), np.int64)
    positions = optional_input(graph, LOGITS_POSITIONS, none, ["batch_size", "wanted"])
    hidden = take(graph.node(head), 0)
    users = tuple(hidden.uses())  # the head's branch takes the same states as the head
    ops = Scope(graph, "positions")
    empty = ops("Equal", ops("Size", positions), ops.constant("none", np.array(0)))
    all_states = ir.Graph([], [], nodes=[], name="everywhere")
    all_states.outputs.append(Scope(all_states, "positions/everywhere")("Identity", hidden))
    some = ir.Graph([], [], nodes=[], name="wanted")
    at = Scope(some, "positions/wanted")
    index = at("Unsqueeze", positions, at.constant("axes", np.array([2])))
    some.outputs.append(at("GatherND", hidden, index, batch_dims=1))
    chosen = ops("If", empty, then_branch=all_states, else_branch=some)
    for user, place in users:
        user.replace_input_with(place, chosen)
    graph.sort()
