"""A compact LoRA adapter of different rank per module, as a PEFT folder.

Every scale is folded into the factors and the configuration says scale 1 (`r == lora_alpha`, and
the same number in `rank_pattern` and `alpha_pattern`), so that an engine which ignores the
patterns' alpha, or applies them, computes the same. For engines of one rank (`Profile.uniform`)
every module is padded with zeros to the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import torch

from ...certificate import certificate, write_certificate, write_json
from ...errors import TargetError
from ...files.output import check_output, output_folder, save_tensors
from ...files.tensors import LazyTensor, load_finite
from ...fit import FitReport, fit_run
from ...model.base import BaseModel
from ...model.layout import is_parameter, split_slice
from ...model.match import changed, check_frozen
from ...model.tasks import peft_type
from ...run import Run
from ...updates.rank_one import stored_error
from ..engines import PROFILES, Profile
from .card import model_card
from .experts import padded, stacked, transposed_modules
from .padding import absent_modules
from .whole import whole_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterPlan:
    """What will be written, from ranks and names.

    `ranks`: start rank and rank per module. `stored`: rank, out and in of every module as stored,
    those included that the run has not and the engine needs, as zeros.
    """

    config: dict[str, object]
    ranks: dict[str, tuple[int | None, int]]
    whole: dict[str, LazyTensor]
    nbytes: int
    stored: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class AdapterResult:
    """What was written, and per module ‖stored ΔW − ΔW‖/‖ΔW‖, ΔW as fitted. `fit`: what fitting
    cost, None where the adapter is the whole update."""

    path: Path
    plan: AdapterPlan
    errors: dict[str, float]
    warnings: tuple[str, ...]
    fit: FitReport | None = None


class AdapterFormat(Protocol):
    """A format of adapters, registered under `dora_serve.writers` and named by `Profile.writer`."""

    def plan(
        self, run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype
    ) -> AdapterPlan:
        """Plan the adapter of `run`; raises `TargetError` for what the target cannot carry."""

    def save(
        self,
        folder: Path,
        name: str,
        run: Run,
        plan: AdapterPlan,
        dtype: torch.dtype,
        fit: FitReport | None,
    ) -> dict[str, float]:
        """Fill `folder`, which will be called `name`; returns ‖stored ΔW − ΔW‖/‖ΔW‖ per module."""


def adapter_format(profile: Profile) -> AdapterFormat:
    """The installed format that `profile` names."""
    (point,) = entry_points(group="dora_serve.writers", name=profile.writer)
    found: AdapterFormat = point.load()()
    return found


def plan_adapter(
    run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype
) -> AdapterPlan:
    """Plan the adapter of `run`; raises `TargetError` for what the target cannot carry."""
    return adapter_format(profile).plan(run, base, profile, dtype)


def _plan(run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype) -> AdapterPlan:
    if not run.updates:
        raise TargetError(
            "the run trained no matrix that a LoRA adapter could update",
            file=run.path,
            found=", ".join(list(run.replaced)[:3]) + " …",
            remedy="merge it (`merge`)",
        )
    transposed: set[str] = set()
    if base is not None:
        transposed = transposed_modules(run, base, profile)
        check_frozen(run, base)
    whole = changed(run, base)
    modules, biases = whole_modules(run, base, whole)
    ranks: dict[str, tuple[int | None, int]] = {}
    for module, rank in run.ranks.items():
        if rank is None:
            raise TargetError(
                "this module's update is not low-rank, so no LoRA adapter equals it",
                tensor=module,
                remedy="merge it (`merge`), or approximate it with `energy` or `max_rank`",
            )
        ranks[module] = (run.start_rank.get(module), rank)
    _check_target(run, profile, whole, ranks, modules, biases)
    if base is not None:
        _check_family(run, base, profile)
    stored = padded(_stored(ranks, {**run.shapes, **absent_modules(run, base, profile)}, profile))
    alive = {module: rank for module, (rank, _, _) in stored.items() if rank}
    config = {
        **_config(run, base, alive, profile),
        "modules_to_save": modules or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": bool(transposed & alive.keys()),
    }
    elements = sum(_numel(tensor) for tensor in whole.values())
    elements += sum(rank * (out + inn) for rank, out, inn in stored.values())
    return AdapterPlan(config, ranks, whole, elements * dtype.itemsize, stored)


def _stored(
    ranks: Mapping[str, tuple[int | None, int]],
    shapes: Mapping[str, tuple[int, int]],
    profile: Profile,
) -> dict[str, tuple[int, int, int]]:
    largest = max((rank for _, rank in ranks.values()), default=0)
    if profile.uniform:
        return {module: (max(1, largest), *shape) for module, shape in shapes.items()}
    stored = {module: (ranks[module][1], *shape) for module, shape in shapes.items()}
    if not largest:
        # Engines refuse an adapter of no module: the first one stays, with a zero component.
        first = next(iter(shapes))
        stored[first] = (1, *shapes[first])
    return stored


def _numel(tensor: LazyTensor) -> int:
    return int(torch.Size(tensor.shape).numel())


def _check_target(
    run: Run,
    profile: Profile,
    whole: Mapping[str, LazyTensor],
    ranks: Mapping[str, tuple[int | None, int]],
    modules: list[str],
    biases: list[str],
) -> None:
    cannot = []
    if profile.kinds is not None:
        cannot += [name for name in ranks if name.split(".")[-1] not in profile.kinds]
    if profile.whole_modules is not None:
        cannot += [name for name in modules if name.split(".")[-1] not in profile.whole_modules]
    if not profile.biases:
        cannot += biases
    if not profile.embeddings:
        cannot += sorted(run.embeddings)
    if profile.whole_modules is not None:
        cannot += [name for name in whole if name.removesuffix(".weight") in ranks]
    if "target_parameters" not in profile.features:
        cannot += [name for name in ranks if is_parameter(name)]
    cannot += [name for name in ranks if name.endswith(".bias") or name in run.tied]
    cannot = list(dict.fromkeys(cannot))
    if cannot:
        more = f" and {len(cannot) - 6} more" if len(cannot) > 6 else ""
        raise TargetError(
            f"the run trained tensors that an adapter for {profile.name} cannot carry",
            file=run.path,
            found=", ".join(cannot[:6]) + more,
            expected=f"whole modules only of {sorted(profile.whole_modules or [])}",
            remedy="deploy the merged model (`merge`), or use `target` peft",
        )
    largest = max((rank for _, rank in ranks.values()), default=0)
    if profile.max_rank is not None and largest > profile.max_rank:
        raise TargetError(
            f"the rank is over the limit of {profile.name}",
            found=largest,
            expected=f"at most {profile.max_rank}",
            remedy="deploy the merged model, or cut the ranks with `max_rank`",
        )


def _check_family(run: Run, base: BaseModel, profile: Profile) -> None:
    family = base.config.get("model_type")
    found = [name for name in run.updates if not profile.adapts(name, family)]
    if found:
        raise TargetError(
            f"{profile.name} does not adapt these modules of a model of the type {family}",
            file=run.path,
            found=", ".join(found[:3]) + (" …" if len(found) > 3 else ""),
            remedy="deploy the merged model (`merge`)",
        )


def _config(
    run: Run, base: BaseModel | None, alive: Mapping[str, int], profile: Profile
) -> dict[str, object]:
    parameters = {split_slice(name)[0] for name in alive if is_parameter(name)}
    alive = {split_slice(name)[0]: rank for name, rank in alive.items()}
    default = max(alive.values())
    patterns = {f"^{module}": rank for module, rank in alive.items() if rank != default}
    targets = (
        {module.split(".")[-1] for module in alive} if profile.uniform else set(alive) - parameters
    )
    task = peft_type(run.task) if run.task is not None else None
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base.name if base is not None else run.base,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
    }


def prepare(
    run: Run,
    base: BaseModel | None,
    max_rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> tuple[Run, FitReport | None]:
    """The run without pruned components, fitted where a limit of `fit_run` is given."""
    stripped = run.strip()
    if max_rank is None and energy is None and budget is None:
        return stripped, None
    return fit_run(stripped, base, max_rank=max_rank, energy=energy, budget=budget)


def write_adapter(
    run: Run,
    target: Path,
    *,
    base: BaseModel | None = None,
    profile: str = "peft",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    max_rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> AdapterResult:
    """Write `run` as a LoRA adapter folder for the target named `profile` (see PROFILES).

    `max_rank`, `energy` or `budget` approximates it, see `fit_run`. Raises `DoraExportError`, with
    nothing written, when the target cannot carry the run.
    """
    if profile not in PROFILES:
        raise TargetError("unknown target", found=profile, expected=", ".join(PROFILES))
    inputs = [run.path, *([base.path] if base is not None else [])]
    check_output(target, force, inputs)
    stripped, fit = prepare(run, base, max_rank, energy, budget)
    output = adapter_format(PROFILES[profile])
    plan = output.plan(stripped, base, PROFILES[profile], dtype)
    check_output(target, force, inputs, plan.nbytes)
    with output_folder(target) as folder:
        errors = output.save(folder, target.name, stripped, plan, dtype, fit)
        warnings = (*run.warnings, *_loss_warnings(errors, dtype))
        if fit is not None and fit.warning is not None:
            warnings = (*warnings, fit.warning)
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
            fit=None if fit is None else asdict(fit),
        )
        write_certificate(folder, proof)
    return AdapterResult(target, plan, errors, warnings, fit)


class LoraFolder:
    """PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`."""

    def plan(
        self, run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype
    ) -> AdapterPlan:
        return _plan(run, base, profile, dtype)

    def save(
        self,
        folder: Path,
        name: str,
        run: Run,
        plan: AdapterPlan,
        dtype: torch.dtype,
        fit: FitReport | None,
    ) -> dict[str, float]:
        tensors: dict[str, torch.Tensor] = {}
        errors: dict[str, float] = {}
        blocks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for module, (rank, out, inn) in plan.stored.items():
            if not rank:
                continue
            a, b = torch.zeros(rank, inn, dtype=dtype), torch.zeros(out, rank, dtype=dtype)
            update = run.updates[module].components() if module in run.updates else None
            if update is not None and update.rank:
                a[: update.rank], b[:, : update.rank] = update.balanced()
                errors[module] = stored_error(update, a, b)
            if is_parameter(module):
                blocks[module] = a, b
            else:
                tensors |= _named(module, a, b, module in run.embeddings)
        for module, (a, b) in stacked(blocks).items():
            tensors |= _named(module, a, b, embedding=False)
        saved = plan.config["modules_to_save"]
        for name, tensor in plan.whole.items():
            module, _, kind = name.rpartition(".")
            inside = isinstance(saved, list) and any(f"{name}.".startswith(f"{m}.") for m in saved)
            adapted = plan.stored.get(module, (0,))[0] > 0 and not inside
            key = f"{module}.base_layer.{kind}" if adapted else name
            tensors[_PREFIX + key] = load_finite(tensor).to(dtype)
        save_tensors(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, plan.config)
        (folder / "README.md").write_text(model_card(run, plan.config, plan.ranks, fit))
        return errors


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


def _loss_warnings(errors: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    lossy = {module: error for module, error in errors.items() if error > 0.05}
    if not lossy:
        return []
    return [f"{dtype} loses more than 5 % of the update in {len(lossy)} modules: use float32"]
