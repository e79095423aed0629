"""Decoders that onnxruntime-genai's model builder does not know, by `torch.onnx.export`.

Inputs, outputs and configuration are named as the builder names them, attention is ONNX Runtime's
GroupQueryAttention, which writes keys and values in place, and experts are its MoE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import TargetError
from ...files.onnx_files import BATCHED, GENAI, MODEL, ROW_LENGTHS
from .adapters import Site
from .branches import add_branches
from .export import Axes, Part, check_graph, computing, fused
from .graph_file import GraphWriter
from .lengths import context_of, free_rotary, optional_lengths, windows_of
from .linear import linear_sites, three_axes
from .loaded import load_whole, write_config
from .positions import add_positions

_NAME = "dora_export"  # of the attention and the experts, for transformers
_ROWS, _TOKENS = "batch_size", "sequence_length"
_Sizes = tuple[int, int, int]  # layers, heads of keys and values, size of a head
_PAST, _TOTAL = "past_sequence_length", "total_sequence_length"


class _Decoder(torch.nn.Module):
    """Logits, then per layer the keys and values, from tokens, positions and what is cached."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface
        from transformers.integrations.moe import ExpertsInterface

        super().__init__()
        self.model = model
        self._windows = windows_of(model, _ids(model.config, rows=1, tokens=3))
        self.border = free_rotary(model, lambda: self._lengths)
        AttentionInterface.register(_NAME, self._attend)
        ExpertsInterface.register(_NAME, _mix)
        model.set_attn_implementation(_NAME)
        if _interleave(model):
            model.set_experts_implementation(_NAME)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        row_lengths: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        self._past, self._lengths = past, row_lengths
        self._present: list[torch.Tensor] = []
        self._last = attention_mask.sum(dim=1).to(torch.int32) - 1
        self._total = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return (output.logits, *self._present)

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,  # noqa: ARG002 - some classes give it by name
        scaling: float | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Causal attention `[rows, tokens, heads, size]`, as transformers asks for it."""
        rows, heads, tokens, size = query.shape
        past = self._past[2 * layer.layer_idx : 2 * layer.layer_idx + 2]
        flat = [each.transpose(1, 2).reshape(rows, tokens, -1) for each in (query, key, value)]
        kept = (rows, key.shape[1], past[0].shape[2] + tokens, size)
        output, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*flat, *past, self._last, self._total],
            {
                "num_heads": heads,
                "kv_num_heads": key.shape[1],
                "scale": size**-0.5 if scaling is None else scaling,
                "local_window_size": self._windows[layer.layer_idx] or -1,
                "softcap": softcap or 0.0,
            },
            dtypes=[query.dtype] * 3,
            shapes=[(rows, tokens, heads * size), kept, kept],
            version=1,
        )
        self._present += present
        return output.view(rows, tokens, heads, size), None


def _mix(
    layer: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts' sum for `hidden [tokens, in]`, of those at `index [tokens, k]` by `weights`.

    MoE takes the logits of all experts and makes its own weights of them, which sum to one: these
    logits let it choose the same experts.
    """
    all_weights = hidden.new_zeros(hidden.shape[0], layer.num_experts).scatter(1, index, weights)
    mixed = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        [hidden, all_weights.clamp(min=1e-30).log(), layer.gate_up_proj, None, layer.down_proj],
        {
            "k": index.shape[1],
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_limit": torch.finfo(torch.float32).max,
            "swiglu_fusion": 1,
        },
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )
    return mixed * all_weights.sum(dim=1, keepdim=True)


def _interleave(model: Any) -> bool:
    """Put the rows of every expert's gate and up matrix in turn, as MoE wants them; whether there
    are experts."""
    found = False
    for module in model.modules():
        fused_rows = getattr(module, "gate_up_proj", None)
        if isinstance(fused_rows, torch.nn.Parameter):
            found = True
            experts, rows, width = fused_rows.shape
            pairs = fused_rows.detach().view(experts, 2, rows // 2, width)
            turned = pairs.transpose(1, 2).reshape(fused_rows.shape)
            module.gate_up_proj = torch.nn.Parameter(turned, requires_grad=False)
    return found


def _plain_linears(model: Any) -> None:
    """Put a Linear where the model has a Conv1D, which is one with its weight turned round."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = torch.nn.Linear(*module.weight.shape)
            linear.weight = torch.nn.Parameter(module.weight.detach().T, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def build_causal(model: Path, out: Path, writer: GraphWriter, *, adaptable: bool) -> None:
    """Write the graphs of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside them; `adaptable`: with a branch behind every linear layer.

    Raises `TargetError` when a graph would not compute what the model computes.
    """
    loaded = load_whole(model)
    sizes = _cached(loaded, _ids(loaded.config, rows=1, tokens=3))
    inputs, truth = _both_ends(loaded, sizes)
    _plain_linears(loaded)
    part = _part(loaded, sizes)
    exported = part.export()
    sites, _ = linear_sites(exported, loaded, part)
    three_axes(exported, sites, loaded)
    head = _head(loaded, sites)

    assert isinstance(part.module, _Decoder)
    border = part.module.border
    if border is None:
        del inputs[ROW_LENGTHS]

    def check(file: Path) -> None:
        check_graph(file, [truth], inputs)

    for name, batched in ((MODEL, False), (BATCHED, True))[: 2 if adaptable else 1]:
        graph = exported.clone()
        if adaptable:
            add_branches(graph, sites, batched)
        graph = fused(graph)
        if border is not None:
            optional_lengths(graph, border)
        add_positions(graph, head)
        modules = {site.node: site.name for site in sites}
        writer.write(name, graph, None if batched else check, modules)
    write_config(loaded, out, model)
    (out / GENAI).write_text(json.dumps(_genai(loaded, sizes), indent=4))


def _cached(loaded: Any, ids: torch.Tensor) -> _Sizes:
    """What the model keeps of tokens. Raises `TargetError` where it computes nothing."""
    try:
        with torch.inference_mode():
            found = loaded(input_ids=ids, use_cache=True)
    except Exception as error:  # of whatever kind: DBRX, where its configuration clips nothing
        raise TargetError(
            "transformers cannot compute this model",
            found=f"{type(loaded).__name__}: {type(error).__name__}: {str(error)[:300]}",
            expected="logits of three tokens",
            remedy="look after its configuration",
        ) from error
    layers = getattr(found.get("past_key_values"), "layers", [])
    shapes = {tuple(getattr(each, "keys", ids).shape[1::2]) for each in layers}
    if len(shapes) != 1 or "logits" not in found or len(min(shapes)) != 2:
        raise TargetError(
            "no ONNX export for this architecture",
            found=type(loaded).__name__,
            expected="logits, and keys and values of one shape in every layer",
            remedy="deploy the merged model instead (`merge`)",
        )
    heads, size = shapes.pop()
    if size % 8:  # of which GroupQueryAttention computes nothing
        raise TargetError(
            "no ONNX export for heads of this size",
            found=f"{size} numbers",
            expected="a multiple of 8",
            remedy="deploy the merged model instead (`merge`)",
        )
    return len(layers), heads, size


def _both_ends(loaded: Any, sizes: _Sizes) -> tuple[dict[str, Any], torch.Tensor]:
    """Rows at the begin and, the last one, at the end of the model's context; its own logits."""
    inputs = _inputs(loaded.config, sizes, rows=3, tokens=5, past=0)
    end = max(0, context_of(loaded.config) - 5)
    inputs["position_ids"][-1] += end
    inputs[ROW_LENGTHS][-1] += end
    rows = zip(inputs["input_ids"].split(1), inputs["position_ids"].split(1), strict=True)
    with computing():
        found = [loaded(input_ids=ids, position_ids=at)["logits"] for ids, at in rows]
    return inputs, torch.cat(found)


def _head(loaded: Any, sites: list[Site]) -> str:
    """The node that makes the logits."""
    output = loaded.get_output_embeddings()
    for site in sites:
        if loaded.get_submodule(site.name) is output:
            return site.node
    raise TargetError(
        "no ONNX export for this architecture",
        found=f"{type(loaded).__name__}, whose head is {type(output).__name__}",
        expected="a linear layer that makes the logits",
        remedy="deploy the merged model instead (`merge`)",
    )


def _ids(config: Any, *, rows: int, tokens: int) -> torch.Tensor:
    numbers = torch.arange(rows * tokens).view(rows, tokens)
    ids: torch.Tensor = numbers * 7 % (config.vocab_size - 3) + 3
    return ids


def _inputs(config: Any, sizes: _Sizes, *, rows: int, tokens: int, past: int) -> dict[str, Any]:
    layers, heads, size = sizes
    cache = torch.zeros(rows, heads, past, size)
    return {
        "input_ids": _ids(config, rows=rows, tokens=tokens),
        "attention_mask": torch.ones(rows, past + tokens, dtype=torch.int64),
        "position_ids": torch.arange(past, past + tokens).repeat(rows, 1),
        ROW_LENGTHS: torch.full((rows,), past + tokens),
        "past": [cache.clone() for _ in range(2 * layers)],
    }


def _part(loaded: Any, sizes: _Sizes) -> Part:
    kinds = [f"{layer}.{kind}" for layer in range(sizes[0]) for kind in ("key", "value")]
    tokens: Axes = (_ROWS, _TOKENS)
    axes: dict[str, Axes | list[Axes]] = {
        "input_ids": tokens,
        "attention_mask": (_ROWS, _TOTAL),
        "position_ids": tokens,
        ROW_LENGTHS: (_ROWS,),
        "past": [(_ROWS, None, _PAST, None)] * len(kinds),
    }
    present: Axes = (_ROWS, None, _TOTAL, None)
    return Part(
        _Decoder(loaded),
        lambda rows: _inputs(loaded.config, sizes, rows=rows, tokens=4, past=3),
        axes,
        {"logits": (*tokens, None), **{f"present.{kind}": present for kind in kinds}},
        [*list(axes)[:4], *(f"past_key_values.{kind}" for kind in kinds)],
    )


def _genai(loaded: Any, sizes: _Sizes) -> dict[str, Any]:
    """What onnxruntime-genai reads."""
    config, given = loaded.config, loaded.generation_config
    layers, heads, size = sizes
    length = context_of(config)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    cache = {"key": "%d.key", "value": "%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": size,
        "hidden_size": config.hidden_size,
        "inputs": inputs | {f"past_{k}_names": f"past_key_values.{v}" for k, v in cache.items()},
        "outputs": {"logits": "logits"}
        | {f"present_{k}_names": f"present.{v}" for k, v in cache.items()},
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
    }
    ends = given.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    tokens = {
        "bos_token_id": given.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": end if given.pad_token_id is None else given.pad_token_id,
    }
    return {
        "model": {
            **{name: [] if value is None else value for name, value in tokens.items()},
            "context_length": length,
            "decoder": decoder,
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {"max_length": length, "past_present_share_buffer": True},
    }
