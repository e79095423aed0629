"""The tasks that graphs are made for: what their outputs are, and which heads are inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .export import Axes

SEQ2SEQ_TASK = "seq2seq-lm"
TOKENS: Axes = ("batch_size", "sequence_length")
OUTPUTS: dict[str, dict[str, Axes]] = {
    "sequence-classification": {"logits": ("batch_size", None)},
    "token-classification": {"logits": (*TOKENS, None)},
    "question-answering": {"start_logits": TOKENS, "end_logits": TOKENS},
    "feature-extraction": {"last_hidden_state": (*TOKENS, None)},
}
ENCODER_TASKS = frozenset(OUTPUTS)


def heads_of(model: Any, task: str) -> dict[str, bool]:
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
