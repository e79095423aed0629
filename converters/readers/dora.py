"""Runs of DoRA, dynamic rank distribution (Mao et al. 2024, arXiv 2405.17357).

Format: the authors' implementation, `Src/Finetune_And_Benchmark/Finetune_Utils.py`. The checkpoint
holds the whole model; ΔW = (lora_alpha / start_rank)·B·diag(lora_scaler)·A, with the start rank as
divisor before and after pruning. Their `Fixed_Lora` runs have no scaler and divide by their rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.json_files import is_number
from ..files.tensors import LazyTensor, LazyTensors, load_torch, read_json
from ..model.tasks import labels_of
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.update import Update
from .module import AdaptedModule, grouped
from .run_folder import RunFolder

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_A, _B, _C = "lora_a_linear.weight", "lora_b_linear.weight", "lora_scaler"
_PARTS = {_A: "A", _B: "B"}
_LORA = re.compile(r"(.+)\.(lora_a_linear\.weight|lora_b_linear\.weight|lora_scaler)")
_LINEAR = re.compile(r"(.+)\.linear\.(weight|bias)")
_BODIES = ("roberta.", "deberta.", "model.")  # what the reference wrapper freezes outside of LoRA

# Model names of the reference implementation and what its Model_Path_Enum loads for them.
_HUB_IDS = {"Roberta_Base": "roberta-base", "Bart_Base": "facebook/bart-base"}


class DoraReader:
    """Reads a checkpoint folder, or finds it in the task folder above."""

    name = "dora"
    looks_for = (
        "checkpoint/ (or the folder itself) with model.safetensors or pytorch_model.bin "
        "whose tensors end in .lora_a_linear.weight"
    )

    def detect(self, folder: RunFolder) -> RunFolder | None:
        for found in (folder, folder.below("checkpoint")):
            file = found.first(*WEIGHT_FILES)
            if file and any(_LORA.fullmatch(name) for name in found.tensors(file)):
                return found
        if (folder.path / "temp_checkpoint").is_dir():
            raise RunError(
                "only an interrupted save is left of this run",
                file=folder.path / "temp_checkpoint",
                expected="checkpoint/",
                remedy="its files may be incomplete: resume the training, or name this folder",
            )
        return None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        file = folder.first(*WEIGHT_FILES)
        assert file is not None
        tensors = _without_wrapper(folder.tensors(file), file)
        info_path = options.task_info or _task_info_path(folder.path)
        info = {} if info_path is None else read_json(info_path)
        modules, _ = grouped(tensors, _LORA, _PARTS)
        scaling = _Scaling(folder.path, info_path, info, options)

        loaders: dict[str, Callable[[], Update]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        start_rank: dict[str, int] = {}
        for name, module in modules.items():
            weights = _C if _C in module.parts else None
            start_rank[name] = _check(module, tensors.get(f"{name}.linear.weight"))
            shapes[name] = module.shape
            scale = scaling.of(start_rank[name], weights is not None)
            loaders[name] = partial(module.sum, scale, weights)

        embedded, replaced = {}, {}
        for name, tensor in tensors.items():
            if _LORA.fullmatch(name):
                continue
            linear = _LINEAR.fullmatch(name)
            if linear and linear[1] in modules:
                embedded[f"{linear[1]}.{linear[2]}"] = tensor
            else:
                embedded[name] = tensor
                if not name.startswith(_BODIES):
                    replaced[name] = tensor

        adaptive = any(_C in module.parts for module in modules.values())
        finished, warnings = _finished(folder.path, info_path) if adaptive else (True, [])
        files = [file, folder.path / "prune_state_dict.pt", *([info_path] if info_path else [])]
        model_name = str(info.get("model_name", "")).rsplit(".", 1)[-1]
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(loaders, shapes),
            replaced=replaced,
            embedded_base=embedded,
            base=_HUB_IDS.get(model_name),
            task=_task(embedded),
            num_labels=labels_of(embedded),
            finished=finished,
            start_rank=start_rank,
            files=tuple(path for path in files if path.exists()),
            options={"lora_alpha": scaling.alpha},
            warnings=tuple(warnings),
        )


def _without_wrapper(tensors: LazyTensors, file: Path) -> dict[str, LazyTensor]:
    """Tensor names without `model.` of the wrapper and `module.` of DistributedDataParallel."""
    prefix = "module.model." if next(iter(tensors)).startswith("module.") else "model."
    stray = next((name for name in tensors if not name.startswith(prefix)), None)
    if stray is None:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    raise RunError(
        "a tensor lies outside the training wrapper",
        file=file,
        tensor=stray,
        expected=f"every name to begin with {prefix}",
    )


def _check(module: AdaptedModule, linear: LazyTensor | None) -> int:
    """The rank; raises `RunError` when A, B, scaler and frozen weight do not fit together."""
    if linear is not None and module.parts.keys() >= {"A", "B"}:
        shape = (*module.parts["B"].shape[:1], *module.parts["A"].shape[-1:])
        if linear.shape != shape:
            raise RunError(
                "the update does not fit the weight it was trained with",
                file=linear.path,
                tensor=f"{module.name}.linear.weight",
                found=list(linear.shape),
                expected=list(shape),
            )
    rank = module.pair((_A, _B))
    if _C in module.parts:
        module.check_size(_C, rank)
    return rank


@dataclass
class _Scaling:
    """Alpha and start rank from the options or from task_info.json; never guessed."""

    folder: Path
    info_path: Path | None
    info: Mapping[str, object]
    options: ReadOptions

    @cached_property
    def alpha(self) -> float:
        said: object = self.options.lora_alpha
        said = self.info.get("lora_alpha") if said is None else said
        if said is None:
            raise RunError(
                "the run's lora_alpha is not known",
                file=self.info_path or self.folder,
                found="no lora_alpha in task_info.json, or no such file in the mirrored Log folder",
                remedy="pass `task_info`, or `lora_alpha` "
                "(the reference configuration always uses 8)",
            )
        try:
            alpha = float(str(said))
        except ValueError:
            alpha = math.nan
        if not is_number(alpha):
            raise RunError("lora_alpha is not a number", file=self.info_path, found=said)
        return alpha

    def of(self, rank: int, adaptive: bool) -> float:
        key = "adaptive_lora_start_rank" if adaptive else "fixed_lora_rank"
        said = self.options.start_rank or self.info.get(key)
        if said is not None and str(said) != str(rank):
            raise RunError(
                "the start rank differs from the checkpoint's",
                file=self.info_path if self.options.start_rank is None else self.folder,
                found=said,
                expected=f"{rank}, the rank of the stored components",
                remedy="is this the task_info.json (or `start_rank`) of another run?",
            )
        return self.alpha / rank if rank else 0.0


def _task_info_path(folder: Path) -> Path | None:
    """task_info.json beside the checkpoint, or in the Log folder at the mirrored path."""
    task = folder.parent if folder.name in ("checkpoint", "temp_checkpoint") else folder
    candidates = [folder / "task_info.json", task / "task_info.json"]
    parts = task.resolve().parts
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] == "Checkpoint":
            candidates.append(Path(*parts[:index], "Log", *parts[index + 1 :], "task_info.json"))
    return next((path for path in candidates if path.is_file()), None)


def _finished(folder: Path, info_path: Path | None) -> tuple[bool, list[str]]:
    """Whether pruning ended: the mask is boolean from the last prune step on, float before."""
    state_path = folder / "prune_state_dict.pt"
    warnings = []
    if not state_path.exists():
        return False, [f"{state_path} is missing: cannot tell whether pruning had finished"]
    state = load_torch(state_path)
    masks = state.get("finally_mask_dict") if isinstance(state, dict) else None
    if not isinstance(masks, dict) or not all(isinstance(m, torch.Tensor) for m in masks.values()):
        raise RunError(
            "not a prune state",
            file=state_path,
            expected="a dict with finally_mask_dict: {module: tensor}",
        )
    finished = bool(masks) and all(mask.dtype == torch.bool for mask in masks.values())
    if not finished:
        warnings.append(
            "pruning had not finished: components are taken as they stand in the checkpoint, "
            "as the live model computed with them"
        )
    elif info_path is not None and (info_path.parent / "uncompleted.txt").exists():
        warnings.append("training was interrupted after pruning (uncompleted.txt is present)")
    return finished, warnings


def _task(embedded: dict[str, LazyTensor]) -> str | None:
    if labels_of(embedded) is not None:
        return "sequence-classification"
    if any(name.startswith("qa_outputs.") for name in embedded):
        return "question-answering"
    if any(name.startswith("model.decoder.") for name in embedded) and any(
        name.startswith("model.encoder.") for name in embedded
    ):
        return "seq2seq-lm"
    return "causal-lm" if any(name.startswith("model.layers.") for name in embedded) else None
