"""Encoders as ONNX: classification, regression, question answering, embeddings.

With adapters, branches stand behind every linear layer but the heads, which are inputs
(`heads.py`).
`batched.onnx` is left out where a layer computes something that all rows of a batch share, as
DeBERTa's relative positions are: rows with different adapters then take a run each.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...base import BaseModel
from ...errors import BaseError, TargetError
from ...onnx_files import BATCHED, LABELS, MODEL, OWN_HEADS
from ...plan import target_architecture
from ...run import Run
from ..merged import copy_companions
from .adapters import write_own_heads
from .branches import Site, add_branches
from .export import DATA, SCOPES, check_graph, export_graph, fused, save_all, shrunk
from .heads import Head, free_heads

OUTPUTS: dict[str, dict[str, list[str | int | None]]] = {
    "sequence-classification": {"logits": ["batch_size", None]},
    "token-classification": {"logits": ["batch_size", "sequence_length", None]},
    "question-answering": {
        "start_logits": ["batch_size", "sequence_length"],
        "end_logits": ["batch_size", "sequence_length"],
    },
    "feature-extraction": {"last_hidden_state": ["batch_size", "sequence_length", None]},
}
ENCODER_TASKS = frozenset(OUTPUTS)
ADAPTER_PRECISIONS = ("fp32", "int8", "int4")


class _Encoder(torch.nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self, model: Any, task: str) -> None:
        super().__init__()
        self.model = model
        self._outputs = list(OUTPUTS[task])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        return tuple(output[name] for name in self._outputs)


def build_encoder(model: Path, out: Path, task: str, precision: str) -> None:
    """Write the graph of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it. Raises `TargetError` when the graph would not compute what the model computes."""
    loaded, missing = load_model(model, None, None)
    if missing:
        raise BaseError("the model lacks tensors", file=model, found=", ".join(missing[:8]))
    module = _Encoder(loaded, task)
    graph = fused(_export(module, task))
    check_graph(graph, module, _inputs(loaded, 3, 5))
    save_all({MODEL: shrunk(graph, precision)}, out, None)
    write_config(loaded, out, model)


def _export(module: _Encoder, task: str) -> Any:
    inputs = _inputs(module.model, 2, 8)
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in inputs}
    return export_graph(module, inputs, axes, OUTPUTS[task])


def build_adaptable_encoder(
    base: BaseModel, runs: Mapping[str, Run], out: Path, task: str, precision: str
) -> None:
    """Write the graphs of `base`, in the class that `runs` are for, able to carry adapters."""
    if precision not in ADAPTER_PRECISIONS:
        raise TargetError(
            "an encoder with adapters is not written in this precision",
            found=precision,
            expected=", ".join(ADAPTER_PRECISIONS),
        )
    first = next(iter(runs.values()))
    architecture, _ = target_architecture(first, base)
    loaded, missing = load_model(base.path, architecture, first.num_labels)
    heads = _heads(loaded, task)
    _check_missing(missing, heads, runs, base)
    with torch.no_grad():
        for name in missing:
            loaded.get_parameter(name).zero_()
    module = _Encoder(loaded, task)
    exported = _export(module, task)
    sites = _linear_sites(exported, loaded)
    shared = any(site.node in _shared(exported) for site in sites)
    weights = {name: _head(loaded, name, labels) for name, labels in heads.items()}
    if weights:
        own = {n: array for head in weights.values() for n, array in head.inputs().items()}
        write_own_heads(out / OWN_HEADS, own)
    graphs = {}
    for name, batched in ((MODEL, False), (BATCHED, True))[: 1 if shared else 2]:
        graph = type(exported)()
        graph.CopyFrom(exported)
        _three_axes(graph, sites, loaded)
        free_heads(graph, {s.node: weights[s.name] for s in sites if s.name in weights}, batched)
        _branches(graph, [site for site in sites if site.name not in weights], batched)
        if any(heads.values()):
            graph.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = LABELS
        graph = fused(graph)
        _prune(graph.graph)
        if not batched:
            check_graph(graph, module, _inputs(loaded, 3, 5))
        graphs[name] = shrunk(graph, precision)
    save_all(graphs, out, DATA)
    write_config(loaded, out, base.path)


def load_model(
    path: Path, architecture: str | None, num_labels: int | None
) -> tuple[Any, list[str]]:
    """The model in float32, and the names of its tensors that the folder does not hold."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if num_labels is not None:
        config.num_labels = num_labels
    name = architecture or (config.architectures or ["AutoModel"])[0]
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, name).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:
        raise TargetError(
            "transformers cannot load this model",
            file=path,
            found=f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}",
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
    known = dict(model.named_parameters())
    return model.eval(), sorted(set(info["missing_keys"]) & known.keys())


def _inputs(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids from a fixed seed, the last row padded."""
    import inspect

    config = model.config
    generator = torch.Generator().manual_seed(0)
    low = min(5, config.vocab_size - 1)
    ids = torch.randint(low, config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    ids[mask == 0] = config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    parts = getattr(config, "type_vocab_size", 0) or 0
    if parts > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = (torch.arange(length).expand(rows, length) >= 2).long()
    return inputs


def _heads(model: Any, task: str) -> dict[str, bool]:
    """The linear layers that adapters may bring whole → whether their outputs are the labels."""
    inside = f"{model.base_model_prefix}."
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (not name.startswith(inside) or "pooler" in name.split("."))
    ]
    if task == "feature-extraction":
        return {}
    free = task.endswith("classification")
    return {name: free and name == names[-1] for name in names}


def _head(model: Any, name: str, labels: bool) -> Head:
    layer = model.get_submodule(name)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return Head(name, layer.weight.detach().numpy(), bias, labels)


def _check_missing(
    missing: list[str], heads: Mapping[str, bool], runs: Mapping[str, Run], base: BaseModel
) -> None:
    for name in missing:
        for run in runs.values():
            brought = name in run.replaced or name in (run.embedded_base or {})
            if not brought or name.rpartition(".")[0] not in heads:
                raise BaseError(
                    "neither the base nor the run has this tensor of the fine-tuned model",
                    file=base.path,
                    tensor=name,
                    found=f"run {run.path}",
                    remedy="was the head saved with the adapter (modules_to_save)?",
                )


def _linear_sites(model: Any, loaded: Any) -> list[Site]:
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


def _axes(model: Any) -> dict[str, list[str | int]]:
    values = [*model.graph.value_info, *model.graph.input]
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def _shared(model: Any) -> set[str]:
    """The nodes whose first input is not one row per row of the batch."""
    axes = _axes(model)
    return {n.name for n in model.graph.node if axes.get(n.input[0], [0])[:1] != ["batch_size"]}


def _three_axes(model: Any, sites: list[Site], loaded: Any) -> None:
    """Let every linear layer be a MatMul of `[batch_size, n, in]` with an Add behind it."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph, axes, by_name = model.graph, _axes(model), {site.node: site for site in sites}
    nodes = []
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "linear/axis"))
    for node in graph.node:
        site = by_name.get(node.name)
        flat = site is not None and (node.op_type == "Gemm" or len(axes[node.input[0]]) == 2)
        if site is None or not flat:
            nodes.append(node)
            continue
        layer, scope = loaded.get_submodule(site.name), f"{node.name}/linear"
        for suffix, value in (("weight", layer.weight.T), ("bias", layer.bias)):
            if value is not None:
                array = np.ascontiguousarray(value.detach().numpy())
                graph.initializer.append(numpy_helper.from_array(array, f"{scope}/{suffix}"))
        product = f"{scope}/product"
        nodes += [
            helper.make_node("Unsqueeze", [node.input[0], "linear/axis"], [f"{scope}/in"]),
            helper.make_node("MatMul", [f"{scope}/in", f"{scope}/weight"], [product], node.name),
        ]
        if node.op_type == "Gemm" and layer.bias is not None:
            nodes.append(helper.make_node("Add", [product, f"{scope}/bias"], [f"{scope}/sum"]))
            product = f"{scope}/sum"
        nodes.append(helper.make_node("Squeeze", [product, "linear/axis"], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)


def _branches(model: Any, sites: list[Site], batched: bool) -> None:
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


def _prune(graph: Any) -> None:
    """Drop weights that no node takes."""
    taken = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in taken]
    del graph.initializer[:]
    graph.initializer.extend(left)
    del graph.value_info[:]  # shapes from before the heads were free


def write_config(model: Any, out: Path, source: Path) -> None:
    copy_companions(source, out)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
