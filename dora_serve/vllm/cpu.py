"""Rows without an adapter, on a CPU: vLLM's LoRA operators give them the last slot's.

They take the slot −1, which says "no adapter", as an index, so that a request for the base gets
another's weights when it shares a step with requests for adapters (vllm-project/vllm pull request
48421, open; the kernels for GPUs skip such rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Shrink = Callable[..., None]


def skip_rows_without_adapter() -> bool:
    """Let the operators skip rows of slot −1; whether they had to be changed. CPU only."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if skips(lora_ops.bgmv_shrink):
        return False
    shrink = skipping(lora_ops.bgmv_shrink)
    for module in (lora_ops, torch_ops, punica_cpu):
        module.bgmv_shrink = shrink
    return True


def skips(shrink: Shrink) -> bool:
    """Whether `shrink` leaves nothing in a row of slot −1."""
    output = torch.zeros(1, 1)
    shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), output, torch.tensor([-1]))
    return not output.any()


def skipping(shrink: Shrink) -> Shrink:
    """`shrink`, with zeros in the rows of slot −1: what is expanded from them is zero too."""

    def bgmv_shrink(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        slots: torch.Tensor,
        *scaling: Any,
        **named: Any,
    ) -> None:
        shrink(inputs, weights, output, slots, *scaling, **named)
        output[: len(slots)][slots < 0] = 0

    return bgmv_shrink
