"""A compact LoRA adapter of different rank per module, as a PEFT folder.

Every scale is folded into the factors and the configuration says scale 1 (`r == lora_alpha`, and
the same number in `rank_pattern` and `alpha_pattern`), so that an engine which ignores the
patterns' alpha, or applies them, computes the same. For engines of one rank (`Profile.uniform`)
every module is padded with zeros to the largest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...certificate import write_json
from ...errors import TargetError, some
from ...files.output import save_tensors
from ...files.tensors import LazyTensor, numel
from ...model.base import BaseModel
from ...model.called import check_called
from ...model.layout import Layout, split_slice
from ...model.match import (
    as_trained,
    changed,
    check_frozen,
    classes,
    kernels_of,
    resolved,
)
from ...model.names import PEFT_PREFIX
from ...model.rows import check_rows
from ...model.tasks import architecture_of, peft_type
from ...model.untying import untied
from ...model.zeroed import as_loaded
from ...progress import Progress
from ...run import NO_UPDATE, Run
from ...updates.rank_one import RankOneSum, stored_error
from ..engines import Profile
from ..target import Plan, Report
from .card import model_card
from .experts import (
    in_memory,
    no_layers,
    padded,
    parameters,
    stacked,
    taken_for_experts,
    transposed_modules,
)
from .names import CONFIG, WEIGHTS
from .padding import absent_modules
from .rows import rows_as_components
from .whole import completed, module_names, narrowed, quantized, whole_modules, with_heads

_NO_MODULE = (".bias", ".in_proj_weight")  # parameters that no pair of an adapter is for
_LOSS = 0.05  # above this share of an update lost to rounding the user is warned


@dataclass(frozen=True)
class AdapterReport(Report):
    """`errors`: per module ‖stored ΔW − ΔW‖/‖ΔW‖, ΔW as fitted."""

    errors: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {"errors": dict(self.errors)}

    def lines(self) -> list[str]:
        if not self.errors:
            return []
        return [f"largest relative error of storing: {max(self.errors.values()):.1e}"]


@dataclass(frozen=True, kw_only=True)
class AdapterPlan(Plan):
    """`parameters`: what of `stored` is no module. `ranks`: start rank and rank per module.
    `whole`: what is stored whole. `stored`: rank, out and in of every module as stored, those
    included that the engine needs as zeros. `kernels`: `[in, *kernel]` of those that are
    convolutions."""

    config: Mapping[str, object]
    parameters: frozenset[str]
    ranks: Mapping[str, tuple[int | None, int]]
    whole: Mapping[str, LazyTensor]
    stored: Mapping[str, tuple[int, int, int]]
    kernels: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def summary(self) -> dict[str, Any]:
        ranks = {module: rank for module, (_, rank) in self.ranks.items()}
        return {
            "ranks": ranks,
            "max_rank": max(ranks.values(), default=0),
            "modules_to_save": self.config["modules_to_save"],
            "whole": sorted(self.whole),
            "fit": None if self.run.fit is None else asdict(self.run.fit),
        }

    def lines(self) -> list[str]:
        ranks = [rank for _, rank in self.ranks.values()]
        said = [
            f"LoRA adapter for {self.target}, {sum(map(bool, ranks))} of {len(ranks)} modules, "
            f"ranks up to {max(ranks, default=0)}, {len(self.whole)} tensors whole"
        ]
        return said if self.run.fit is None else [*said, *self.run.fit.lines()]

    def write(self, folder: Path, name: str, progress: Progress) -> AdapterReport:
        errors = self.save(folder, name)
        progress(self.nbytes)
        lossy = [module for module, error in errors.items() if error > _LOSS]
        warning = f"{self.dtype} loses more than 5 % of the update in {len(lossy)} modules"
        modules = {
            module: {"start_rank": start, "rank": rank, "error": errors.get(module, 0.0)}
            for module, (start, rank) in self.ranks.items()
        }
        details = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "replaced": sorted(self.whole),
        }
        warnings = (f"{warning}: use float32",) if lossy else ()
        return AdapterReport(modules, details, warnings, errors)

    def save(self, folder: Path, name: str) -> dict[str, float]:
        """Fill `folder`; returns ‖stored ΔW − ΔW‖/‖ΔW‖ per module."""
        tensors: dict[str, torch.Tensor] = {}
        errors: dict[str, float] = {}
        blocks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for module, (rank, out, inn) in self.stored.items():
            if not rank:
                continue
            a, b = (
                torch.zeros(rank, inn, dtype=self.dtype),
                torch.zeros(out, rank, dtype=self.dtype),
            )
            update = self.components(module)
            if update is not None:
                a[: update.rank], b[:, : update.rank] = update.balanced()
                errors[module] = stored_error(update, a, b)
            if module in self.parameters:
                blocks[module] = a, b
            elif module in self.kernels:
                ones = [1] * (len(self.kernels[module]) - 1)
                a, b = a.view(rank, *self.kernels[module]), b.view(out, rank, *ones)
                tensors |= _named(module, a, b, embedding=False)
            else:
                tensors |= _named(module, a, b, module in self.run.embeddings)
        for module, (a, b) in stacked(blocks).items():
            tensors |= _named(module, a, b, embedding=False)
        saved = self.config["modules_to_save"]
        for name, tensor in self.whole.items():
            module, _, kind = name.rpartition(".")
            inside = isinstance(saved, list) and any(f"{name}.".startswith(f"{m}.") for m in saved)
            adapted = self.stored.get(module, (0,))[0] > 0 and not inside
            key = f"{module}.base_layer.{kind}" if adapted else name
            tensors[PEFT_PREFIX + key] = narrowed(tensor, self.dtype)
        save_tensors(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, self.config)
        (folder / "README.md").write_text(model_card(self))
        return errors

    def components(self, module: str) -> RankOneSum | None:
        """What of a stored module is no zeros."""
        update = self.run.updates[module].components() if module in self.run.updates else None
        return update if update is not None and update.rank else None


def plan_adapter(
    run: Run, base: BaseModel | None, profile: Profile, dtype: torch.dtype
) -> AdapterPlan:
    """Plan the adapter of `run`; raises `TargetError` for what the target cannot carry."""
    if not run.updates:
        raise TargetError(
            "the run trained no matrix that a LoRA adapter could update",
            file=run.path,
            found=", ".join(list(run.replaced)[:3]) + " …",
            remedy="merge it (`merge`)",
        )
    transposed: set[str] = set()
    own, layout = base, None
    if base is not None:
        run, layout = named_for(run, base, profile)
        architecture = layout.names.architecture
        own, _ = as_loaded(run, base, architecture, layout.find)
        run, own = untied(run, own, architecture, layout.find, together=False)
        run = rows_as_components(run, own, layout)
        transposed = transposed_modules(run, own, layout, profile)
        check_frozen(run, own)
    whole = changed(run, own, None if layout is None else layout.find)
    if own is not None and layout is not None:
        shapes = {name: tensor.shape for name, tensor in whole.items()}
        check_rows(run, own, layout.names.architecture, whole, shapes, layout.find)
    whole = with_heads(run, own, whole, profile)
    modules, biases = whole_modules(run, own, whole, layout)
    if biases:  # all or none, as PEFT saves them
        whole |= {n: t for n, t in run.replaced.items() if n.endswith(".bias") and n not in whole}
    whole = completed(own, run, whole, modules, layout)
    ranks: dict[str, tuple[int | None, int]] = {}
    for module, rank in run.ranks.items():
        if rank is None:
            raise TargetError(
                "this module's update is not low-rank, so no LoRA adapter equals it",
                tensor=module,
                remedy="merge it (`merge`)"
                + ("" if module in run.tied else ", or approximate it with `energy` or `max_rank`"),
            )
        ranks[module] = (run.start_rank.get(module), rank)
    kernels, within = kernels_of(run, base), module_names(layout)
    kept = parameters(run, layout)
    _check_target(run, base, profile, whole, ranks, modules, biases, sorted(kept), kernels, within)
    if base is not None:
        _check_family(run, base, profile)
    stored = padded(
        _stored(ranks, {**run.shapes, **absent_modules(run, base, layout, profile)}, profile)
    )
    alive = {module: rank for module, (rank, _, _) in stored.items() if rank}
    config = {
        **_config(run, base, alive, profile, kept, layout),
        "modules_to_save": modules or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": bool(transposed & alive.keys()),
    }
    told = quantized(base, whole, modules)
    told += [] if any(rank for _, rank in ranks.values()) else [NO_UPDATE]
    elements = sum(numel(tensor) for tensor in whole.values())
    elements += sum(rank * (out + inn) for rank, out, inn in stored.values())
    return AdapterPlan(
        target=profile.name,
        run=run,
        base=base,
        nbytes=elements * dtype.itemsize,
        warnings=(*run.warnings, *told),
        config=config,
        parameters=kept,
        ranks=ranks,
        whole=whole,
        stored=stored,
        kernels=kernels,
        dtype=dtype,
    )


def named_for(run: Run, base: BaseModel, profile: Profile) -> tuple[Run, Layout]:
    """The run under the names of the class that the engine loads, and that class's layout."""
    if profile.text_models:
        run, layout = as_trained(run, base)
    else:
        run, layout = resolved(run, base), classes(run.task, run.num_labels, base).whole
    check_called(run, base)
    return (in_memory(run, layout) if "target_parameters" in profile.features else run), layout


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


def _check_target(
    run: Run,
    base: BaseModel | None,
    profile: Profile,
    whole: Mapping[str, LazyTensor],
    ranks: Mapping[str, tuple[int | None, int]],
    modules: list[str],
    biases: list[str],
    parameters: Collection[str],
    kernels: Collection[str],
    within: Collection[str],
) -> None:
    cannot: list[str] = []
    if not profile.convolutions:
        cannot += kernels
    if profile.kinds is not None:
        cannot += [name for name in ranks if name.split(".")[-1] not in profile.kinds]
    if profile.whole_modules is not None:
        cannot += [name for name in modules if name.split(".")[-1] not in profile.whole_modules]
    if not profile.biases:
        cannot += biases
    if not profile.embeds(None if base is None else base.config.get("model_type")):
        cannot += sorted(run.embeddings)
    if profile.whole_modules is not None:
        cannot += [name for name in whole if name.removesuffix(".weight") in ranks]
    if "target_parameters" not in profile.features:
        cannot += parameters
    nowhere = [name for name in ranks if name.endswith(_NO_MODULE) or name in run.tied]
    # A parameter of the model itself, and a module that PEFT would find inside of itself again.
    nowhere += [name for name in modules if name in whole or _again(name, within)]
    cannot = list(dict.fromkeys([*cannot, *nowhere]))
    if cannot:
        raise TargetError(
            f"the run trained tensors that an adapter for {profile.name} cannot carry",
            file=run.path,
            found=some(cannot),
            expected=_kinds(profile),
            remedy="merge it (`merge`)" + ("" if nowhere else ", or use `target` peft"),
        )
    largest = max((rank for _, rank in ranks.values()), default=0)
    if profile.max_rank is not None and largest > profile.max_rank:
        raise TargetError(
            f"the rank is over the limit of {profile.name}",
            found=largest,
            expected=f"at most {profile.max_rank}",
            remedy="deploy the merged model, or cut the ranks with `max_rank`",
        )


def _again(module: str, names: Collection[str]) -> bool:
    """Whether one of the modules inside of `module` ends in its name."""
    return any(name.startswith(f"{module}.") and name.endswith(module) for name in names)


def _kinds(profile: Profile) -> str:
    whole = profile.whole_modules
    said = "" if whole is None else f" of {', '.join(sorted(whole))}" if whole else " of none"
    return f"pairs of factors for matrices, and whole modules{said}"


def _check_family(run: Run, base: BaseModel, profile: Profile) -> None:
    family = base.config.get("model_type")
    own = architecture_of(base.config)
    found = [name for name in run.updates if not profile.adapts(name, family, own)]
    if found:
        raise TargetError(
            f"{profile.name} does not adapt these modules of a model of the type {family}",
            file=run.path,
            found=", ".join(found[:3]) + (" …" if len(found) > 3 else ""),
            remedy="deploy the merged model (`merge`)",
        )


def _config(
    run: Run,
    base: BaseModel | None,
    alive: Mapping[str, int],
    profile: Profile,
    parameters: Collection[str],
    layout: Layout | None,
) -> dict[str, object]:
    owned = {split_slice(name)[0] for name in alive if name in parameters}
    alive = {split_slice(name)[0]: rank for name, rank in alive.items()}
    if "target_parameters" in profile.features:
        layers = alive.keys() - owned
        experts = taken_for_experts(layers, base) | no_layers(layers, layout)
        alive = {f"{n}.weight" if n in experts else n: rank for n, rank in alive.items()}
        owned |= {f"{name}.weight" for name in experts}
    default = max(alive.values())
    patterns = {f"^{module}": rank for module, rank in alive.items() if rank != default}
    targets = {module.split(".")[-1] for module in alive} if profile.uniform else set(alive) - owned
    task = peft_type(run.task) if run.task is not None else None
    # A name finds all that end in it; an expression finds what it says.
    endings = tuple(f".{name}" for name in targets)
    within = module_names(layout)
    more = not profile.uniform and any(n.endswith(endings) and n not in targets for n in within)
    revision = base.revision if base is not None else run.revision
    return {
        "peft_type": "LORA",
        "task_type": task,
        **({"revision": revision} if revision else {}),
        "base_model_name_or_path": base.name if base is not None else run.base,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(map(re.escape, sorted(targets))) if more else sorted(targets),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        **({"target_parameters": sorted(owned)} if owned else {}),
    }


def _named(
    module: str, a: torch.Tensor, b: torch.Tensor, embedding: bool
) -> dict[str, torch.Tensor]:
    if embedding:  # PEFT stores ΔE = (B·A)ᵀ: A [r, vocab], B [dim, r]
        return {
            f"{PEFT_PREFIX}{module}.lora_embedding_A": b.T.contiguous(),
            f"{PEFT_PREFIX}{module}.lora_embedding_B": a.T.contiguous(),
        }
    return {
        f"{PEFT_PREFIX}{module}.lora_A.weight": a.contiguous(),
        f"{PEFT_PREFIX}{module}.lora_B.weight": b.contiguous(),
    }
