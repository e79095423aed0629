"""The linear layers of a torch model in the graph that was exported from it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .adapters import Site
from .export import Part
from .surgery import Scope, replace, take

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules a node comes from


def linear_sites(model: ir.Model, loaded: Any, part: Part) -> tuple[list[Site], set[str]]:
    """The nodes of the graph `model` of `part` that compute a linear layer, in order, and the names
    of the layers that are left out.

    These compute more often than there are nodes of them: where all that goes into a layer is
    constant the exporter has computed it, and no branch could stand there. Or what goes in does not
    begin with the rows of the batch (FSMT has the tokens first), by which a branch tells adapters.
    """
    linear = {n: each for n, each in loaded.named_modules() if isinstance(each, torch.nn.Linear)}
    layers = {name: (each.in_features, each.out_features) for name, each in linear.items()}
    inputs = part.example(2)  # which the model may compute too
    called = _given(part.module, inputs, linear)
    others = _given(part.module, {name: _other_last(each) for name, each in inputs.items()}, linear)
    sites = []
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        modules = [scope.removeprefix("model.") for scope in scopes]
        if node.op_type in ("MatMul", "Gemm") and len(modules) > 1 and modules[-2] in layers:
            sites.append(Site(str(node.name), modules[-2], *layers[modules[-2]]))
    found = Counter(site.name for site in sites)
    lost = {
        name
        for name, given in called.items()
        if found[name] < len(given) or not all(map(_first_row_alike, given, others[name]))
    }
    return [site for site in sites if site.name not in lost], lost


def _given(
    module: Any, inputs: Mapping[str, Any], layers: Mapping[str, torch.nn.Module]
) -> dict[str, list[torch.Tensor]]:
    """What each of `layers` is given, call by call, where `module` is given `inputs`."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, more, name=name: found.setdefault(name, []).append(
                (*given, *more.values())[0].clone()
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with torch.inference_mode():
        module(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def _other_last(given: Any) -> Any:
    """The same tensor, or tensors, with another last row."""
    if isinstance(given, list):
        return [_other_last(each) for each in given]
    return torch.cat([given[:-1], given[-1:].flip(tuple(range(1, given.ndim)))])


def _first_row_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the first of two rows is the same in both, where rows come first."""
    half = one.numel() // 2
    return one.shape == other.shape and torch.allclose(
        one.flatten()[:half], other.flatten()[:half], atol=1e-4, equal_nan=True
    )


def three_axes(model: ir.Model, sites: list[Site], loaded: Any) -> None:
    """Let every linear layer be a MatMul of `[batch_size, n, in]` with an Add behind it."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    rows = Scope(graph, "linear")("Shape", graph.inputs[0], end=1)
    for site in sites:
        node, scope = nodes[site.node], Scope(graph, f"{site.node}/linear")
        given = take(node, 0)
        if node.op_type == "MatMul" and given.shape is not None and len(given.shape) != 2:
            continue
        rest = scope.constant("rest", np.array([-1, site.in_features]))
        states = scope("Reshape", given, scope("Concat", rows, rest, axis=0))
        layer = loaded.get_submodule(site.name)
        weight = scope.constant("weight", layer.weight.detach().numpy().T)
        product = scope.op("MatMul", [states, weight], name=site.node)
        product.name = f"{site.node}/linear/product"
        if node.op_type == "Gemm" and layer.bias is not None:
            product = scope("Add", product, scope.constant("bias", layer.bias.detach().numpy()))
        replace(node.outputs[0], scope("Flatten", product, axis=2))
        graph.remove(node, safe=True)
    graph.sort()
