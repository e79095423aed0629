"""The two graphs of an encoder-decoder's decoder as one, as transformers.js wants it.

`use_cache_branch` tells them apart: false for the first tokens, true where caches are given. Names
and meaning are those of huggingface/optimum `optimum/onnx/graph_transformations.py`
(`merge_decoders`); keys and values over the encoder's output come back as they were given.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...files.onnx_files import DECODER, MERGED, WITH_PAST

_FLAG = "use_cache_branch"


def write_both_steps(folder: Path) -> None:
    """Write the graph beside those two, over their file of weights."""
    first, later = (ir.load(folder / name) for name in (DECODER, WITH_PAST))
    names, renewed = ([str(v.name) for v in model.graph.outputs] for model in (first, later))
    flag = ir.val(_FLAG, ir.DataType.BOOL, [1])
    outer: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    begin = _branch(first.graph, "first", outer, weights)
    go_on = _branch(later.graph, "later", outer, weights)
    told = dict(zip(renewed, go_on.outputs, strict=True))
    for name in names:
        if name not in told:
            given = outer[name.replace("present", "past_key_values", 1)]
            go_on.append(ir.node("Identity", [given], name=f"later/{name}"))
            told[name] = go_on[-1].outputs[0]
            told[name].name = f"later/{name}"
    go_on.outputs[:] = [told[name] for name in names]
    choice = ir.node(
        "If",
        [flag],
        {"then_branch": go_on, "else_branch": begin},
        num_outputs=len(names),
        name=_FLAG,
    )
    for value, name, either in zip(choice.outputs, names, begin.outputs, strict=True):
        value.name, value.type = name, either.type
        # The two branches name a length otherwise.
        axes = [None if isinstance(axis, ir.SymbolicDim) else axis for axis in either.shape or ()]
        value.shape = ir.Shape(axes)
    graph = ir.Graph(
        [*outer.values(), flag],
        choice.outputs,
        nodes=[choice],
        initializers=list(weights.values()),
        opset_imports=first.graph.opset_imports | later.graph.opset_imports,
        name="decoder",
    )
    ir.save(ir.Model(graph, ir_version=max(first.ir_version, later.ir_version)), folder / MERGED)


def _branch(
    graph: ir.Graph, where: str, outer: dict[str, ir.Value], weights: dict[str, ir.Value]
) -> ir.Graph:
    """The graph as a branch: its inputs are those of `outer`, where it adds its own, its weights
    those of `weights`, and the rest is called by `where` it is."""
    for value in (*graph.inputs, *graph.initializers.values()):
        name, given = str(value.name), value in graph.inputs
        known = outer if given else weights
        if not given and name in known and _place(known[name]) != _place(value):
            name = f"{where}/{name}"
        if name not in known:
            known[name] = ir.val(name, type=value.type, shape=value.shape)
            known[name].const_value = value.const_value
            if given and value.is_initializer():
                weights[name] = known[name]
        value.replace_all_uses_with(known[name], replace_graph_outputs=True)
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for node in nodes:
        node.name = f"{where}/{node.name}"
        for value in node.outputs:
            if value.name:
                value.name = f"{where}/{value.name}"
    branch = ir.Graph([], outputs, nodes=nodes, name=where)
    branch.sort()
    return branch


def _place(weight: ir.Value) -> tuple[object, ...]:
    """Equal for two weights at one place of the file, and for two equal small constants."""
    tensor = weight.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.dtype, tensor.shape, tensor.offset, tensor.length
    return tensor.dtype, tensor.shape, tensor.tobytes()
