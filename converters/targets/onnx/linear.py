"""The linear layers of a torch model in the graph that was exported from it."""

from __future__ import annotations

import ast
from typing import Any

import torch

from .branches import Site, add_branches
from .export import SCOPES


def linear_sites(model: Any, loaded: Any) -> list[Site]:
    """The nodes that compute a linear layer of the model, in the order of the graph."""
    layers = {
        name: (layer.in_features, layer.out_features)
        for name, layer in loaded.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    sites = []
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        modules = [scope.removeprefix("model.") for scope in ast.literal_eval(scopes)]
        if node.op_type in ("MatMul", "Gemm") and len(modules) > 1 and modules[-2] in layers:
            sites.append(Site(node.name, modules[-2], *layers[modules[-2]]))
    return sites


def axes_of(model: Any) -> dict[str, list[str | int]]:
    values = [*model.graph.value_info, *model.graph.input]
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def three_axes(model: Any, sites: list[Site], loaded: Any) -> None:
    """Let every linear layer be a MatMul of `[batch_size, n, in]` with an Add behind it."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph, axes, by_name = model.graph, axes_of(model), {site.node: site for site in sites}
    nodes = [helper.make_node("Shape", ["input_ids"], ["linear/rows"], "linear/rows", end=1)]

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    for node in graph.node:
        site = by_name.get(node.name)
        flat = site is not None and (node.op_type == "Gemm" or len(axes[node.input[0]]) == 2)
        if site is None or not flat:
            nodes.append(node)
            continue
        layer, scope = loaded.get_submodule(site.name), f"{node.name}/linear"
        weight = constant(f"{scope}/weight", layer.weight.detach().numpy().T)
        rest = constant(f"{scope}/rest", np.array([-1, site.in_features]))
        shape, rows, product = f"{scope}/shape", f"{scope}/in", f"{scope}/product"
        nodes += [
            helper.make_node("Concat", ["linear/rows", rest], [shape], shape, axis=0),
            helper.make_node("Reshape", [node.input[0], shape], [rows], rows),
            helper.make_node("MatMul", [rows, weight], [product], node.name),
        ]
        if node.op_type == "Gemm" and layer.bias is not None:
            bias = constant(f"{scope}/bias", layer.bias.detach().numpy())
            nodes.append(helper.make_node("Add", [product, bias], [f"{scope}/sum"]))
            product = f"{scope}/sum"
        nodes.append(helper.make_node("Flatten", [product], [node.output[0]], axis=2))
    del graph.node[:]
    graph.node.extend(nodes)


def branches_behind(model: Any, sites: list[Site], batched: bool) -> None:
    """A branch behind every site; a layer that is used again takes the same A and B there."""
    seen: dict[str, int] = {}
    numbered, same = [], {}
    for site in sites:
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}#{seen[site.name]}"
        same[name] = site.name
        numbered.append(Site(site.node, name, site.in_features, site.out_features))
    add_branches(model, numbered, batched)
    graph = model.graph
    for field in (graph.input, graph.initializer):
        left = [value for value in field if "#" not in value.name]
        del field[:]
        field.extend(left)
    for node in graph.node:
        for i, taken in enumerate(node.input):
            module, dot, kind = taken.rpartition(".lora_")
            if dot and module in same:
                node.input[i] = f"{same[module]}.lora_{kind}"


def prune(graph: Any) -> None:
    """Drop weights that no node takes, and the shapes of values, which may be others by now."""
    taken = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in taken]
    del graph.initializer[:]
    graph.initializer.extend(left)
    del graph.value_info[:]
