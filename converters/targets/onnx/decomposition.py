"""Nearly half of what torch's ONNX exporter takes is a second trace of the graph, which decomposes
what has no translation and what changes its input. Where there is neither, the graph stays as the
first trace made it. A fifth is a third trace, which casts what an operator computes in another
dtype: what that leaves as it was needs not be computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter
from torch.onnx._internal.fx.passes.type_promotion import (
    _TypePromotionInterpreter,
    get_type_promotion_rule,
)

_ATEN = torch.ops.aten
# What the second trace makes of the few operators without a translation that most models have.
_OTHERWISE = {
    _ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor,
    _ATEN.__or__.Tensor: _ATEN.bitwise_or.Tensor,
    _ATEN.max.other: _ATEN.maximum.default,
    _ATEN.min.other: _ATEN.minimum.default,
}
# In place, of a sum that nobody else reads: T5 makes its buckets so.
_ADDED = _ATEN.add_.Tensor
_CASTS = {
    _ATEN.detach_.default,
    _ATEN.to.device,
    _ATEN.to.dtype,
    _ATEN.to.dtype_layout,
    _ATEN.to.other,
}
_ASSERTIONS = ("aten._assert_", "aten.sym_constrain_range_for_size")  # the exporter removes them


def onnx_program(module: torch.nn.Module, **options: Any) -> torch.onnx.ONNXProgram | None:
    """What `torch.onnx.export` returns for `options`, in about half of the time where its second
    trace would change nothing. Raises what it raises."""
    with _decomposing_where_needed() as left:
        try:
            return torch.onnx.export(module, (), **options)
        except Exception:
            if not left:
                raise
    return torch.onnx.export(module, (), **options)


@contextlib.contextmanager
def _decomposing_where_needed() -> Iterator[list[ExportedProgram]]:
    """While this lasts, a program in which nothing is to be decomposed is returned as it is, and is
    in the list."""
    left: list[ExportedProgram] = []
    decompose: Any = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, decomp_table: Any = None, **more: Any) -> Any:
        nodes = program.graph.nodes
        if decomp_table is None or not all(_is_translated(node, decomp_table) for node in nodes):
            return decompose(program, decomp_table, **more)
        for node in nodes:
            _simplify(node)
        left.append(program)
        return program

    casting: Any = _TypePromotionInterpreter
    promote = casting.run_node
    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    casting.run_node = _promote
    try:
        yield left
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]
        casting.run_node = promote


def _promote(interpreter: _TypePromotionInterpreter, node: torch.fx.Node) -> Any:
    """As torch's `run_node`, but for what a node computes: that its first trace has told, and its
    dtype stays what it is."""
    with interpreter._set_current_node(node):
        if rule := get_type_promotion_rule(node, interpreter.type_promotion_table):
            interpreter._maybe_promote_node(node, rule)
    known = node.meta.get("val") if node.op == "call_function" else None
    return Interpreter.run_node(interpreter, node) if known is None else known


def _is_translated(node: torch.fx.Node, decompositions: Any) -> bool:
    """Whether the exporter may take the node as `_simplify` leaves it."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")  # and no part that is a graph of its own
    operator: Any = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return not isinstance(operator, torch._ops.HigherOrderOperator)  # one of sizes
    if operator in _OTHERWISE or operator in _CASTS or str(operator).startswith(_ASSERTIONS):
        return True
    if operator is _ADDED:
        return _is_alone(node)
    return operator not in decompositions and not operator._schema.is_mutable


def _is_alone(node: torch.fx.Node) -> bool:
    """Whether what `node` adds to is a sum of its dtype that no other node reads."""
    given, other = node.args[:2]
    if not isinstance(given, torch.fx.Node) or not isinstance(other, torch.fx.Node):
        return False
    values = given.meta["val"], other.meta["val"]
    alone = given.target is _ATEN.add.Tensor and len(given.users) == 1
    return alone and torch.result_type(*values) == values[0].dtype


def _simplify(node: torch.fx.Node) -> None:
    if node.target in _OTHERWISE:
        node.target = _OTHERWISE[node.target]
    elif node.target is _ADDED:
        node.target = _ATEN.add.Tensor
    elif node.target in _CASTS:
        given, dtype = node.args[0], node.meta["val"].dtype
        assert isinstance(given, torch.fx.Node)
        same = given.meta["val"].dtype == dtype
        node.target = _ATEN.clone.default if same else _ATEN._to_copy.default
        node.args, node.kwargs = (given,), {} if same else {"dtype": dtype}
