"""What a graph of 8 bits multiplies, rounded token by token.

ONNX Runtime's quantizer lets all that goes into a product share one range (DynamicQuantizeLinear),
the rows of a batch too: one row of large numbers would leave the others few steps, or none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .surgery import Scope, replace, take

_STEPS, _ZERO = 127, 128  # on either side of zero in 8 bits, and what stands for zero
_LEAST = 1e-30  # a token of zeros is divided by it


def own_range(model: ir.Model) -> None:
    """Give every token the range of its own numbers, in place: they are divided by the largest of
    them and rounded, and what the product makes of them is multiplied by that again."""
    graph = model.graph
    shared = Scope(graph, "own_range")
    axis = shared.constant("axis", np.array([-1]))
    least = shared.constant("least", np.array(_LEAST, np.float32))
    step = shared.constant("step", np.array(1 / _STEPS, np.float32))
    zero = shared.constant("zero", np.array(_ZERO, np.uint8))
    for node in [each for each in graph if each.op_type == "DynamicQuantizeLinear"]:
        scope, given = Scope(graph, f"{node.name}/own_range"), take(node, 0)
        largest = scope("ReduceMax", scope("Abs", given), axis, keepdims=1)
        largest = scope("Max", largest, least)
        rounded = scope("QuantizeLinear", scope("Div", given, largest), step, zero)
        products = [user for user, _ in node.outputs[0].uses()]
        for old, new in zip(node.outputs, (rounded, step, zero), strict=True):
            old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        for product in products:  # then the quantizer has a Cast, and the scale
            for _ in range(2):
                ((product, _),) = product.outputs[0].uses()
            found = product.outputs[0]
            replace(found, scope("Mul", found, largest))
    graph.sort()
