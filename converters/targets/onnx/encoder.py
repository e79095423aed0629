"""Encoders as ONNX: classification, regression, question answering, embeddings.

With adapters, branches stand behind every linear layer but the heads, which are inputs
(`heads.py`).
`batched.onnx` is left out where a layer computes something that all rows of a batch share, as
DeBERTa's relative positions are: rows with different adapters then take a run each.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ...errors import BaseError
from ...files.onnx_files import BATCHED, LABELS, MODEL, OWN_HEADS
from ...model.base import BaseModel, open_base
from ...model.match import target_architecture
from ...run import Run
from .adapters import write_own_heads
from .branches import add_branches
from .export import Part, fused
from .graph_file import GraphWriter, put_inside
from .heads import Head, free_heads
from .linear import linear_sites, three_axes
from .loaded import load_model, load_whole, write_config
from .surgery import take
from .tasks import OUTPUTS, TOKENS, heads_of


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


def build_encoder(model: Path, out: Path, task: str, writer: GraphWriter) -> None:
    """Write the graph of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it. Raises `TargetError` when the graph would not compute what the model computes."""
    architecture, _ = target_architecture(Run(model, "none", {}, task=task), open_base(model))
    loaded = load_whole(model, architecture, _unread(task))
    part = _part(loaded, task)
    writer.write(MODEL, fused(part.export()), part.check)
    put_inside(out / MODEL)
    write_config(loaded, out, model)


def build_adaptable_encoder(
    base: BaseModel, runs: Mapping[str, Run], out: Path, task: str, writer: GraphWriter
) -> None:
    """Write the graphs of `base`, in the class that `runs` are for, able to carry adapters."""
    first = next(iter(runs.values()))
    architecture, _ = target_architecture(first, base)
    loaded, missing = load_model(base.path, architecture, first.num_labels)
    missing = [name for name in missing if not name.startswith(_unread(task))]
    heads = heads_of(loaded, task)
    _check_missing(missing, heads, runs, base)
    with torch.no_grad():
        for name in missing:
            loaded.get_parameter(name).zero_()
    part = _part(loaded, task)
    exported = part.export()
    sites, _ = linear_sites(exported, loaded, part)
    shared = _shared(exported, {site.node for site in sites})
    weights = {name: _head(loaded, name, labels) for name, labels in heads.items()}
    if weights:
        own = {n: array for head in weights.values() for n, array in head.inputs().items()}
        write_own_heads(out / OWN_HEADS, own)
    three_axes(exported, sites, loaded)
    for name, batched in ((MODEL, False), (BATCHED, True))[: 1 if shared else 2]:
        graph = exported.clone()
        free_heads(graph, {s.node: weights[s.name] for s in sites if s.name in weights}, batched)
        add_branches(graph, [site for site in sites if site.name not in weights], batched)
        if any(heads.values()):
            logits = graph.graph.outputs[0]
            logits.shape = ir.Shape([*OUTPUTS[task]["logits"][:-1], LABELS])
        writer.write(name, fused(graph), None if batched else part.check)
    write_config(loaded, out, base.path, task)


def _unread(task: str) -> tuple[str, ...]:
    """What a class has that its outputs for `task` are not made of: embedders come without."""
    return ("pooler.",) if task == "feature-extraction" else ()


def _part(loaded: Any, task: str) -> Part:
    axes = dict.fromkeys(_inputs(loaded, 1), TOKENS)
    return Part(_Encoder(loaded, task), lambda rows: _inputs(loaded, rows), axes, OUTPUTS[task])


def _inputs(model: Any, rows: int) -> dict[str, torch.Tensor]:
    """Token ids from a fixed seed, the last row padded."""
    import inspect

    config, length = model.config, rows + 4
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


def _shared(model: ir.Model, nodes: Container[str]) -> bool:
    """Whether the first input of one of the nodes is not one row per row of the batch."""
    shapes = [take(node, 0).shape for node in model.graph if node.name in nodes]
    return any(shape is None or shape[0] != "batch_size" for shape in shapes)
