"""A compact LoRA adapter of different rank per module, as a PEFT folder.

Every scale is folded into the factors and the configuration says scale 1 (`r == lora_alpha`, and
the same number in `rank_pattern` and `alpha_pattern`), so that an engine which ignores the
patterns' alpha, or applies them, computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..base import BaseModel
from ..certificate import FILE, certificate, write_json
from ..errors import TargetError
from ..output import check_output, output_folder
from ..plan import changed, check_frozen
from ..run import HEADS, Run
from ..tensors import LazyTensor, load_finite
from ..update import RankOneSum
from .card import model_card
from .profiles import PROFILES, Profile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterPlan:
    """What will be written, from ranks and names; `error`: ‖stored ΔW − ΔW‖/‖ΔW‖ once known."""

    config: dict[str, object]
    ranks: dict[str, tuple[int | None, int]]
    whole: dict[str, LazyTensor]
    nbytes: int


@dataclass(frozen=True)
class AdapterResult:
    """What was written, and per module ‖stored ΔW − ΔW‖/‖ΔW‖."""

    path: Path
    plan: AdapterPlan
    errors: dict[str, float]
    warnings: tuple[str, ...]


def plan_adapter(
    run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype
) -> AdapterPlan:
    """Plan the adapter of `run`; raises `TargetError` for what the target cannot carry."""
    whole = dict(run.replaced)
    if base is not None:
        for module, update in run.updates.items():
            base.is_transposed(module, update.shape, module in run.embeddings)
        check_frozen(run, base)
        whole = changed(run, base)
    ranks: dict[str, tuple[int | None, int]] = {}
    elements = sum(_numel(tensor) for tensor in whole.values())
    for module, update in run.updates.items():
        components = _components(module, update.components())
        ranks[module] = (run.start_rank.get(module), components.rank)
        elements += components.rank * sum(components.shape)
    _check_target(run, profile, whole, ranks)
    config = _config(run, base, whole, {module: rank for module, (_, rank) in ranks.items()})
    return AdapterPlan(config, ranks, whole, elements * dtype.itemsize)


def _numel(tensor: LazyTensor) -> int:
    return int(torch.Size(tensor.shape).numel())


def _components(module: str, components: RankOneSum | None) -> RankOneSum:
    if components is None:
        raise TargetError(
            "this module's update is not low-rank, so no LoRA adapter equals it",
            tensor=module,
            remedy="merge it: dora-export merge",
        )
    return components


def _check_target(
    run: Run,
    profile: Profile,
    whole: Mapping[str, LazyTensor],
    ranks: Mapping[str, tuple[int | None, int]],
) -> None:
    modules, biases = _whole_modules(run, whole)
    cannot = []
    if profile.whole_modules is not None:
        cannot += [name for name in modules if name.split(".")[-1] not in profile.whole_modules]
    if not profile.biases:
        cannot += biases
    if not profile.embeddings:
        cannot += sorted(run.embeddings)
    if cannot:
        raise TargetError(
            f"the run trained tensors that an adapter for {profile.name} cannot carry",
            file=run.path,
            found=", ".join(cannot),
            expected=f"whole modules only of {sorted(profile.whole_modules or [])}",
            remedy="deploy the merged model (dora-export merge), or use --target peft",
        )
    largest = max((rank for _, rank in ranks.values()), default=0)
    if profile.max_rank is not None and largest > profile.max_rank:
        raise TargetError(
            f"the rank is over the limit of {profile.name}",
            found=largest,
            expected=f"at most {profile.max_rank}",
            remedy="deploy the merged model",
        )


def _whole_modules(run: Run, whole: Mapping[str, LazyTensor]) -> tuple[list[str], list[str]]:
    """Modules to save whole, and biases trained beside frozen weights.

    A head is named by its outermost module (`classifier`), as PEFT and vLLM do; a module inside
    the adapted body by its own name.
    """
    bodies = {module.split(".", 1)[0] for module in run.updates}
    modules: dict[str, None] = {}
    biases = []
    for name in whole:
        module, _, kind = name.rpartition(".")
        if name.split(".", 1)[0] not in bodies:
            modules[name.split(".", 1)[0]] = None
        elif kind == "bias" and f"{module}.weight" not in whole:
            biases.append(name)
        else:
            modules[module] = None
    return list(modules), biases


def _config(
    run: Run, base: BaseModel | None, whole: Mapping[str, LazyTensor], ranks: Mapping[str, int]
) -> dict[str, object]:
    modules, biases = _whole_modules(run, whole)
    alive = {module: rank for module, rank in ranks.items() if rank}
    if not alive:
        # Engines refuse an adapter of no module: the first one stays, with a zero component.
        alive = {next(iter(ranks)): 1}
    default = max(alive.values())
    patterns = {f"^{module}": rank for module, rank in alive.items() if rank != default}
    task = HEADS[run.task][1] if run.task is not None else None
    fan_in_fan_out = base is not None and any(
        base.is_transposed(module, run.updates[module].shape, module in run.embeddings)
        for module in alive
    )
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base.name if base is not None else run.base,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(alive),
        "modules_to_save": modules or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def write_adapter(
    run: Run,
    target: Path,
    *,
    base: BaseModel | None = None,
    profile: str = "peft",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> AdapterResult:
    """Write `run` as a LoRA adapter folder for the target named `profile` (see PROFILES).

    Raises `DoraExportError`, with nothing written, when the target cannot carry the run.
    """
    if profile not in PROFILES:
        raise TargetError("unknown target", found=profile, expected=", ".join(PROFILES))
    inputs = [run.path, *([base.path] if base is not None else [])]
    check_output(target, force, inputs)
    stripped = run.strip()
    plan = plan_adapter(stripped, base, PROFILES[profile], dtype)
    check_output(target, force, inputs, plan.nbytes)
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for module in plan.ranks:
        update = stripped.updates[module].components()
        assert update is not None
        if update.rank:
            a, b = (factor.to(dtype) for factor in update.balanced())
            errors[module] = _stored_error(update, a, b)
            tensors |= _named(module, a, b, module in run.embeddings)
    if not tensors:
        module = next(iter(plan.ranks))
        out, inn = stripped.updates[module].shape
        a, b = torch.zeros(1, inn, dtype=dtype), torch.zeros(out, 1, dtype=dtype)
        tensors |= _named(module, a, b, module in run.embeddings)
    saved = plan.config["modules_to_save"]
    for name, tensor in plan.whole.items():
        module, _, kind = name.rpartition(".")
        inside = isinstance(saved, list) and any(f"{name}.".startswith(f"{m}.") for m in saved)
        adapted = module in run.updates and not inside
        key = f"{module}.base_layer.{kind}" if adapted else name
        tensors[_PREFIX + key] = load_finite(tensor).to(dtype)

    warnings = (*run.warnings, *_loss_warnings(errors, dtype))
    with output_folder(target) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, plan.config)
        (folder / "README.md").write_text(model_card(run, plan.config, plan.ranks))
        modules = {
            module: {"start_rank": start, "rank": rank, "error": errors.get(module, 0.0)}
            for module, (start, rank) in plan.ranks.items()
        }
        proof = certificate(
            "adapter",
            run,
            base,
            modules,
            target=profile,
            dtype=str(dtype).removeprefix("torch."),
            replaced=sorted(plan.whole),
        )
        write_json(folder / FILE, proof)
    return AdapterResult(target, plan, errors, warnings)


def _named(
    module: str, a: torch.Tensor, b: torch.Tensor, embedding: bool
) -> dict[str, torch.Tensor]:
    if embedding:  # PEFT stores ΔE = (B·A)ᵀ: A [r, vocab], B [dim, r]
        return {
            f"{_PREFIX}{module}.lora_embedding_A": b.T.contiguous(),
            f"{_PREFIX}{module}.lora_embedding_B": a.T.contiguous(),
        }
    return {
        f"{_PREFIX}{module}.lora_A.weight": a.contiguous(),
        f"{_PREFIX}{module}.lora_B.weight": b.contiguous(),
    }


def _stored_error(update: RankOneSum, a: torch.Tensor, b: torch.Tensor) -> float:
    """‖stored ΔW − ΔW‖/‖ΔW‖ by the norm of the rank-2r difference, never of `[out, in]`."""
    difference = RankOneSum(
        torch.cat([a.float(), update.a]),
        torch.cat([torch.ones(update.rank), -update.c]),
        torch.cat([b.float(), update.b], dim=1),
    )
    norm = update.norm()
    return difference.norm() / norm if norm else 0.0


def _loss_warnings(errors: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    lossy = {module: error for module, error in errors.items() if error > 0.05}
    if not lossy:
        return []
    return [f"{dtype} loses more than 5 % of the update in {len(lossy)} modules: use float32"]
