"""A small trainer of dynamic-rank updates (DoRA), written from the paper (arXiv 2405.17357).

It leaves a run as the authors' implementation does: the whole model under a `model.` prefix,
`prune_state_dict.pt`, and a log folder at the mirrored path. Used to make the sample runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Batch = Callable[[torch.Generator, int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Settings:
    """Names and default values as in the reference configuration."""

    model_name: str
    dataset_name: str
    task_tag: str
    linear_name_to_apply_lora_list: tuple[str, ...]
    num_label: int = 0
    seed: int = 1
    lr: float = 4e-3
    batch_size: int = 64
    steps: int = 1200
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fixed_lora_rank: int = 0
    adaptive_lora_start_rank: int = 12
    adaptive_lora_end_avg_rank: int = 8
    adaptive_lora_start_prune_step_ratio: float = 0.15
    adaptive_lora_end_prune_step_ratio: float = 0.5
    adaptive_lora_prune_interval_step: int = 20
    adaptive_lora_sensitivity_beta: float = 0.9
    adaptive_lora_eps: float = 1e-8
    regularization_loss_alpha: float = 0.1
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06


class AdaptiveLinear(nn.Module):
    """W·x + (alpha/r0)·B·(c ∘ A·x), the names of its tensors being those of the format."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_a_linear = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_scaler = nn.Parameter(torch.zeros(rank))
        self.lora_b_linear = nn.Linear(rank, linear.out_features, bias=False)
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.lora_a_linear.weight)
        nn.init.kaiming_uniform_(self.lora_b_linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.lora_b_linear(self.lora_a_linear(x) * self.lora_scaler)
        return self.linear(x) + self.scaling * update  # type: ignore[no-any-return]

    def importance(self, eps: float) -> torch.Tensor:
        """‖cᵢbᵢaᵢᵀ‖_F / ‖ΔW‖_F for each component (equation 6), without forming a component."""
        a = self.lora_a_linear.weight * self.lora_scaler.unsqueeze(1)
        b = self.lora_b_linear.weight
        score: torch.Tensor = a.norm(dim=1) * b.norm(dim=0) / ((b @ a).norm() + eps)
        return score

    def variance(self) -> torch.Tensor:
        """Sum over components of the variances of aᵢ and bᵢ, for the regulariser."""
        a, b = self.lora_a_linear.weight, self.lora_b_linear.weight
        return a.var(dim=1).sum() + b.var(dim=0).sum()


class DoraTrainer:
    """Wraps `model`, trains it, prunes it, and writes the run."""

    def __init__(self, model: Any, settings: Settings, body: str) -> None:
        torch.manual_seed(settings.seed)
        self.model, self.settings = model, settings
        self.layers: dict[str, AdaptiveLinear] = {}
        names = settings.linear_name_to_apply_lora_list
        for name, module in list(model.named_modules()):
            adapted = name.startswith(f"{body}.") and any(part in name for part in names)
            if adapted and type(module) is nn.Linear:
                layer = AdaptiveLinear(
                    module, settings.adaptive_lora_start_rank, settings.lora_alpha
                )
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer)
                self.layers[name] = layer
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or not name.startswith(f"{body}."))
        rank = settings.adaptive_lora_start_rank
        self.scores = {name: torch.zeros(rank) for name in self.layers}
        self.masks = {name: torch.zeros(rank) for name in self.layers}
        begin = settings.steps * settings.adaptive_lora_start_prune_step_ratio
        end = settings.steps * (1 - settings.adaptive_lora_end_prune_step_ratio)
        self._begin, self._span = int(begin), int(end - begin)

    def train(
        self, batch: Callable[[torch.Generator, int], dict[str, torch.Tensor]]
    ) -> list[float]:
        """Train on batches drawn from `batch(generator, size)`; returns the losses."""
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
        warmup = int(s.steps * s.warmup_ratio)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, (s.steps - step) / (s.steps - warmup)),
        )
        self.model.train()
        losses = []
        for step in range(1, s.steps + 1):
            loss = self.model(**batch(generator, s.batch_size)).loss
            losses.append(loss.item())
            if step - self._begin <= self._span:
                components = 2 * s.adaptive_lora_start_rank * len(self.layers)
                variance = torch.stack([layer.variance() for layer in self.layers.values()]).sum()
                loss = loss + s.regularization_loss_alpha * variance / components
            loss.backward()
            nn.utils.clip_grad_norm_(trained, s.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            self._prune(step - self._begin)
        self.model.eval()
        return losses

    @torch.no_grad()
    def _prune(self, step: int) -> None:
        """Update the importance, and at every interval zero the least important components.

        The share to prune grows with the cube of the time; after the last step the mask is kept.
        """
        s = self.settings
        if step > self._span:
            for name, layer in self.layers.items():
                layer.lora_scaler[self.masks[name]] = 0
            return
        beta = s.adaptive_lora_sensitivity_beta
        for name, layer in self.layers.items():
            score = layer.importance(s.adaptive_lora_eps)
            self.scores[name] = beta * self.scores[name] + (1 - beta) * score
        last = step == self._span
        if step < 0 or (step % s.adaptive_lora_prune_interval_step and not last):
            return
        start, end = s.adaptive_lora_start_rank, s.adaptive_lora_end_avg_rank
        scores = torch.cat(list(self.scores.values()))
        count = int(scores.numel() * (start - end) / start * (step / self._span) ** 3)
        threshold = torch.kthvalue(scores, max(count, 1)).values
        for name, layer in self.layers.items():
            pruned = self.scores[name] <= threshold
            layer.lora_scaler[pruned] = 0
            if last:
                self.masks[name] = pruned

    def ranks(self) -> dict[str, int]:
        return {name: int((layer.lora_scaler != 0).sum()) for name, layer in self.layers.items()}

    def save(self, root: Path, losses: list[float], safetensors: bool = True) -> Path:
        """Write checkpoint and log folder below `root`; returns the checkpoint folder.

        Without `safetensors` the weights are `pytorch_model.bin`, as accelerate 0.22 wrote them,
        tied aliases included; otherwise one name of each tied group is kept.
        """
        s = self.settings
        task = Path(s.model_name, f"Lora_Rank={s.adaptive_lora_end_avg_rank}", s.dataset_name)
        checkpoint = root / "Checkpoint" / task / s.task_tag / "checkpoint"
        log = root / "Log" / task / s.task_tag
        checkpoint.mkdir(parents=True)
        (log / "Adaptive_Lora_Info_Graph").mkdir(parents=True)
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if safetensors:
            unique = {tensor.data_ptr(): name for name, tensor in reversed(list(state.items()))}
            kept = {n: t.contiguous() for n, t in state.items() if unique[t.data_ptr()] == n}
            save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(state, checkpoint / "pytorch_model.bin")
        torch.save(
            {"sensitivity_score_dict": self.scores, "finally_mask_dict": self.masks},
            checkpoint / "prune_state_dict.pt",
        )
        torch.save({"train_loss": losses[-20:]}, checkpoint / "record_dict.pt")
        (checkpoint / "step_num.json").write_text(str(s.steps))
        info = {
            **{key: str(value) for key, value in asdict(s).items()},
            "model_name": f"Model_Name_Enum.{s.model_name}",
            "dataset_name": f"Dataset_Name_Enum.{s.dataset_name}",
            "finetune_type": "Finetune_Type_Enum.Adaptive_Lora",
            "linear_name_to_apply_lora_list": str(list(s.linear_name_to_apply_lora_list)),
        }
        write_json(log / "task_info.json", info)
        every = max(1, len(losses) // 60)
        write_json(log / "full_record.json", {"train_loss": losses[::every]})
        final = math.fsum(losses[-20:]) / 20
        (log / "train_log.txt").write_text(f"prune finished\ntrain_loss: {final:.4f}\n")
        (log / "eval_log.txt").write_text("prune finished\n")
        write_json(log / "Adaptive_Lora_Info_Graph" / "lora_rank_map.json", self._rank_map())
        return checkpoint

    def _rank_map(self) -> list[list[int]]:
        names = self.settings.linear_name_to_apply_lora_list
        ranks = self.ranks()
        layers = 1 + max(_layer(name) for name in ranks)
        grid = [[0] * layers for _ in names]
        for name, rank in ranks.items():
            kind = next(index for index, part in enumerate(names) if part in name)
            grid[kind][_layer(name)] = rank
        return grid


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
