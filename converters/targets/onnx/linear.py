"""The linear layers of a torch model in the graph that was exported from it."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .branches import Site
from .surgery import Scope, replace, take

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules a node comes from


def linear_sites(model: ir.Model, loaded: Any) -> list[Site]:
    """The nodes that compute a linear layer of the model, in the order of the graph."""
    layers = {
        name: (layer.in_features, layer.out_features)
        for name, layer in loaded.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    sites = []
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        modules = [scope.removeprefix("model.") for scope in scopes]
        if node.op_type in ("MatMul", "Gemm") and len(modules) > 1 and modules[-2] in layers:
            sites.append(Site(str(node.name), modules[-2], *layers[modules[-2]]))
    return sites


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
