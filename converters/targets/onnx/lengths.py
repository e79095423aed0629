"""What a decoder computes beyond the length of a short prompt: windows, and rotary embeddings that
change with the length of their row.

Windows are read off the masks that transformers itself makes, whatever a configuration calls them.
Where the embedding has another form for rows longer than a border (longrope), each row has the form
of its own length, whichever rows run beside it; the length of a row is what its attention mask
says, or `row_lengths`, where more of it is still to come.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import TargetError
from ...files.onnx_files import BORDER, ROW_LENGTHS
from .surgery import Scope, optional_input

_LONGEST = 1 << 24  # tokens of a context
_NAME = "dora_export_windows"  # of an attention that only looks at its mask, for transformers


def context_of(config: Any) -> int:
    """How many tokens a model of transformers' configuration `config` reads at most.

    Raises `TargetError` where it does not say, or says more than any has.
    """
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise TargetError(
            "no ONNX export for a model that does not say how long its context is",
            found=f"no max_position_embeddings in the configuration of {config.model_type}",
            remedy="deploy the merged model instead (`merge`)",
        )
    if context > _LONGEST:
        raise TargetError(
            "no ONNX export for so long a context", found=context, expected=f"at most {_LONGEST}"
        )
    return context


def windows_of(model: Any, ids: torch.Tensor) -> dict[int, int | None]:
    """Layer → how many tokens of its context a token attends to, itself among them; None is all.

    Raises `TargetError` for attention that does not go back from the token itself.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    context = context_of(model.config)
    tokens = torch.tensor(sorted({0, context // 3, context // 2, context - 1}))
    windows: dict[int, int | None] = {}

    def mask_of(*, mask_function: Callable[..., torch.Tensor], **_: object) -> torch.Tensor:
        none = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        return mask_function(none, none, tokens.view(1, 1, -1, 1), torch.arange(context))

    def attend(
        layer: Any,
        query: torch.Tensor,
        _key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        seen = attention_mask
        windows[layer.layer_idx] = sliding_window if seen is None else _window(seen, tokens)
        rows, heads, length = query.shape[:3]
        return query.new_zeros(rows, length, heads, value.shape[-1]), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, mask_of)
    model.set_attn_implementation(_NAME)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    model.set_attn_implementation(before)
    return windows


def _window(mask: torch.Tensor, tokens: torch.Tensor) -> int | None:
    """The window of a mask `[1, 1, tokens, context]` that is true where a token attends."""
    seen = mask.expand(1, 1, len(tokens), -1)[0, 0]
    context = seen.shape[1]
    window = int(seen[-1].sum())
    ages = tokens[:, None] - torch.arange(context)
    if not torch.equal(seen, (ages >= 0) & (ages < window)):
        raise TargetError(
            "no ONNX export for this model's attention",
            found="tokens that attend to others than those right before them",
            expected="causal attention, to the whole context or to a window of it",
            remedy="deploy the merged model instead (`merge`)",
        )
    return window if window < context else None


class Rotary(torch.nn.Module):
    """A rotary embedding of transformers without what it keeps from one call to the next.

    `border` is the length beyond which a row takes the long form; None where there is one form:
    dynamic scaling has another one beyond the context only.
    """

    def __init__(self, embedding: Any, lengths: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._lengths, self._forward = lengths, inspect.unwrap(type(embedding).forward)
        self.short, self.long = embedding, copy.deepcopy(embedding)
        types = embedding.rope_type
        self._borders: dict[str | None, int] = {
            layers: self._split(layers)
            for layers, kind in (types if isinstance(types, dict) else {None: types}).items()
            if kind == "longrope"
        }
        self.border = next(iter(self._borders.values()), None)
        if len(set(self._borders.values())) > 1:
            raise TargetError(
                "no ONNX export for this model's rotary embedding",
                found=f"another form beyond {sorted(set(self._borders.values()))} tokens",
                expected="one length at which it changes",
                remedy="deploy the merged model instead (`merge`)",
            )

    def _split(self, layers: str | None) -> int:
        """Give either side its frequencies of those layers; the border between them."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = self.short.config
        settings = config.rope_parameters[layers] if layers else config.rope_parameters
        border = int(settings["original_max_position_embeddings"])
        for side, length in ((self.short, border), (self.long, border + 1)):
            make = ROPE_INIT_FUNCTIONS["longrope"]
            frequencies, _ = make(config, torch.device("cpu"), seq_len=length, layer_type=layers)
            setattr(side, f"{layers}_inv_freq" if layers else "inv_freq", frequencies)
        return border

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        more = {} if layer_type is None else {"layer_type": layer_type}
        short = self._forward(self.short, hidden, position_ids, **more)
        if layer_type not in self._borders:
            return tuple(short)
        long = self._forward(self.long, hidden, position_ids, **more)
        beyond = (self._lengths() > self._borders[layer_type]).view(-1, 1, 1)
        return tuple(torch.where(beyond, far, near) for far, near in zip(long, short, strict=True))


def free_rotary(model: Any, lengths: Callable[[], torch.Tensor]) -> int | None:
    """Let every rotary embedding compute from its inputs alone, and from what `lengths` returns
    when it runs: of each row, int64 `[rows]`. Returns the border, if they have one."""
    found = {
        name: Rotary(module, lengths)
        for name, module in model.named_modules()
        if hasattr(module, "rope_type") and hasattr(module, "config")
    }
    for name, rotary in found.items():
        model.set_submodule(name, rotary)
    return next((each.border for each in found.values() if each.border is not None), None)


def optional_lengths(model: ir.Model, border: int) -> None:
    """Let the input `row_lengths` of a graph be one that need not be given, and note the border. In
    place."""
    graph = model.graph
    given = next(value for value in graph.inputs if value.name == ROW_LENGTHS)
    graph.inputs.remove(given)
    given.name = "rows/given"
    ops = Scope(graph, "rows")
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    known = ops("ReduceSum", mask, ops.constant("axes", np.array([1])), keepdims=0)
    told = optional_input(graph, ROW_LENGTHS, np.zeros(1, np.int64), ["lengths"])
    given.replace_all_uses_with(ops("Max", known, told))
    graph.sort()
    model.metadata_props[BORDER] = str(border)
