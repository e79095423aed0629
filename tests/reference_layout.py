"""Writes a model with random updates in the reference implementation's layout, to be damaged.

What is right is tested on really trained runs (`models/`, `tests/data/reference/`); this is for
the many ways in which a run can be wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

START_RANK, ALPHA = 6, 8


def state_dict(model: Any, targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The wrapper's tensors: every target linear gets A, B and a scaler with pruned entries."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.rsplit(".", 1)[-1] not in targets:
            state[f"model.{name}"] = tensor.clone()
            continue
        state[f"model.{module}.linear.{kind}"] = tensor.clone()
        if kind == "weight":
            out, inn = tensor.shape
            scaler = torch.randn(START_RANK, generator=generator)
            scaler[torch.randperm(START_RANK, generator=generator)[: START_RANK // 2]] = 0
            state[f"model.{module}.lora_a_linear.weight"] = torch.randn(
                START_RANK, inn, generator=generator
            )
            state[f"model.{module}.lora_scaler"] = scaler
            state[f"model.{module}.lora_b_linear.weight"] = (
                torch.randn(out, START_RANK, generator=generator) * 0.1
            )
    return state


def write_run(root: Path, state: dict[str, torch.Tensor], **info: str) -> Path:
    """Write checkpoint and log folder below `root`; returns the checkpoint folder."""
    task = Path("Tiny", "Lora_Rank=4", "Task", "tag")
    checkpoint, log = root / "Checkpoint" / task / "checkpoint", root / "Log" / task
    checkpoint.mkdir(parents=True)
    log.mkdir(parents=True)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    scalers = {n: t for n, t in state.items() if n.endswith(".lora_scaler")}
    names = {n: n.removeprefix("model.").removesuffix(".lora_scaler") for n in scalers}
    torch.save(
        {
            "sensitivity_score_dict": {names[n]: t.abs() for n, t in scalers.items()},
            "finally_mask_dict": {names[n]: t == 0 for n, t in scalers.items()},
        },
        checkpoint / "prune_state_dict.pt",
    )
    (checkpoint / "step_num.json").write_text("20")
    values = {
        "model_name": "Model_Name_Enum.Tiny",
        "finetune_type": "Finetune_Type_Enum.Adaptive_Lora",
        "lora_alpha": str(ALPHA),
        "adaptive_lora_start_rank": str(START_RANK),
        **info,
    }
    (log / "task_info.json").write_text(json.dumps(values, indent=4))
    return checkpoint
