"""Encoders as ONNX: classification, regression, question answering, embeddings.

With adapters, branches stand behind every linear layer but the heads, which are inputs
(`heads.py`).
`batched.onnx` is left out where a layer computes something that all rows of a batch share, as
DeBERTa's relative positions are: rows with different adapters then take a run each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import BaseError
from ...files.onnx_files import BATCHED, LABELS, MODEL, OWN_HEADS
from ...model.base import BaseModel
from ...model.match import target_architecture
from ...run import Run
from .adapters import write_own_heads
from .export import DATA, check_graph, expected, export_graph, fused, save_all, shrunk
from .heads import Head, free_heads
from .linear import axes_of, branches_behind, linear_sites, prune, three_axes
from .loaded import load_model, write_config

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
    graph = fused(_export(module, task, out))
    _check(graph, module, out)
    save_all({MODEL: shrunk(graph, precision)}, out, None)
    write_config(loaded, out, model)


def _check(graph: Any, module: _Encoder, out: Path) -> None:
    inputs = _inputs(module.model, 3, 5)
    check_graph(graph, expected(module, inputs), inputs, out)


def _export(module: _Encoder, task: str, out: Path) -> Any:
    inputs = _inputs(module.model, 2, 8)
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in inputs}
    return export_graph(module, inputs, axes, OUTPUTS[task], out)


def build_adaptable_encoder(
    base: BaseModel, runs: Mapping[str, Run], out: Path, task: str, precision: str
) -> None:
    """Write the graphs of `base`, in the class that `runs` are for, able to carry adapters."""
    first = next(iter(runs.values()))
    architecture, _ = target_architecture(first, base)
    loaded, missing = load_model(base.path, architecture, first.num_labels)
    heads = _heads(loaded, task)
    _check_missing(missing, heads, runs, base)
    with torch.no_grad():
        for name in missing:
            loaded.get_parameter(name).zero_()
    module = _Encoder(loaded, task)
    exported = _export(module, task, out)
    sites = linear_sites(exported, loaded)
    shared = any(site.node in _shared(exported) for site in sites)
    weights = {name: _head(loaded, name, labels) for name, labels in heads.items()}
    if weights:
        own = {n: array for head in weights.values() for n, array in head.inputs().items()}
        write_own_heads(out / OWN_HEADS, own)
    graphs = {}
    for name, batched in ((MODEL, False), (BATCHED, True))[: 1 if shared else 2]:
        graph = type(exported)()
        graph.CopyFrom(exported)
        three_axes(graph, sites, loaded)
        free_heads(graph, {s.node: weights[s.name] for s in sites if s.name in weights}, batched)
        branches_behind(graph, [site for site in sites if site.name not in weights], batched)
        if any(heads.values()):
            graph.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = LABELS
        graph = fused(graph)
        prune(graph.graph)
        if not batched:
            _check(graph, module, out)
        graphs[name] = shrunk(graph, precision)
    save_all(graphs, out, DATA)
    write_config(loaded, out, base.path)


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


def _shared(model: Any) -> set[str]:
    """The nodes whose first input is not one row per row of the batch."""
    axes = axes_of(model)
    return {n.name for n in model.graph.node if axes.get(n.input[0], [0])[:1] != ["batch_size"]}
