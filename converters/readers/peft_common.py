"""What the adapter folders of PEFT and its forks have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TypedDict

from ..errors import BaseError, MissingError, RunError
from ..files.handles import there
from ..files.json_files import is_number
from ..files.tensors import LazyTensors
from ..model.base import BaseModel, open_base
from ..model.tasks import HEADS, labels_of, task_of, task_of_peft
from ..options import ReadOptions
from .patterns import PatternError, Patterns


class Origin(TypedDict):
    """The fields of a `Run` that say what it was trained on, and for what."""

    base: str | None
    revision: str | None
    task: str | None
    num_labels: int | None
    apart: frozenset[str]


def origin(config: Mapping[str, object], replaced: LazyTensors) -> Origin:
    """Base model and task as the configuration names them, and which of the `replaced` tensors are
    of modules saved whole (`modules_to_save`)."""
    task = task_of_peft(config.get("task_type"))
    own = task_of({"architectures": [class_said(config)]}) or ""
    heads = tuple(f"{head}." for head in HEADS.get(own, ()))
    whole = [name for name in replaced if name.endswith(".weight")]
    # A decoder's class says it even where its base is an embedder by itself (Qwen3-Embedding).
    if task is None and (own == "causal-lm" or any(name.startswith(heads) for name in whole)):
        task = own
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return {
        "base": str(base) if base else None,
        "revision": str(revision) if revision else None,
        "task": task,
        "num_labels": labels_of(replaced) if str(task).endswith("classification") else None,
        "apart": _copies(config, replaced),
    }


def class_said(config: Mapping[str, object]) -> str:
    """The class of transformers that the run was trained in, which PEFT notes where it was told no
    task; else empty."""
    said = config.get("auto_mapping")
    return str(said.get("base_model_class") or "") if isinstance(said, Mapping) else ""


def check_class(name: str, task: str | None, base: BaseModel | None, path: Path) -> None:
    """Raise `RunError` where the run was trained in the class `name`, which is no task's here (it
    fills in words), and its base is an embedder by its pooling: the class would be the embedder's,
    whose names are others, and which has not the head."""
    own = {"architectures": [name]}
    if base is None or not name or task is not None or task_of(own) is not None:
        return
    if base.task != task_of(base.config):
        raise RunError(
            "the run was trained in a class that fills in words, and the base is an embedder by "
            "its modules.json",
            file=path,
            found=name,
            expected=f"a run for {base.task}",
            remedy="pass a copy of the base without modules.json with `base`",
        )


def _copies(config: Mapping[str, object], replaced: LazyTensors) -> frozenset[str]:
    """The tensors of modules that PEFT copies (`_set_trainable`); it loads others into the model's
    own, and so into what is tied to them."""
    saved = modules_to_save(config)
    return frozenset(name for name in replaced if any(is_below(name, entry) for entry in saved))


def modules_to_save(config: Mapping[str, object]) -> list[str]:
    """The entries of the configuration's `modules_to_save`."""
    saved = config.get("modules_to_save")
    return [str(name) for name in saved] if isinstance(saved, list) else []


def check_saved(config: Mapping[str, object], modules: Iterable[str], path: Path) -> None:
    """Raise `RunError` where PEFT, which takes these entries for regular expressions, would not
    come back from one, asking it for `modules`."""
    patterns, saved = Patterns(), config.get("modules_to_save")
    entries = map(str, saved if isinstance(saved, str | list | dict) else ())  # a text's letters
    for entry, module in product(entries, modules):
        try:
            patterns.part(entry, module)
        except PatternError as error:
            raise RunError(str(error), file=path, found=entry) from None


def is_below(name: str, entry: str) -> bool:
    """Whether PEFT takes the tensor `name` for one of a module that `entry` names: whose name ends
    so."""
    return any(name[:end].endswith(entry) for end, char in enumerate(name) if char == ".")


def refuse_unread(replaced: Iterable[str], file: Path, word: str = "lora_") -> None:
    """Raise `RunError` for a tensor of an adapter that would be taken for one trained whole: one
    whose name has the method's `word`."""
    for name in replaced:
        if word in name:
            raise RunError(
                "a part of the adapter that this reader does not read",
                file=file,
                tensor=name,
                expected="adapters on linear layers only, under the names PEFT saves",
                remedy="where an adapter's name is in the tensors' names: `lint` with `fix`",
            )


# Tinker's names of the head and of all experts' layers at once.
_TINKER = re.compile(r"(?:.+\.)?(?:unembed_tokens|experts\.w[123])\.lora_[AB]\.weight")


def refuse_tinker(tensors: Iterable[str], file: Path) -> None:
    """Raise `RunError` for an adapter that its trainer's own converter has not made PEFT's yet."""
    for name in filter(_TINKER.fullmatch, tensors):
        raise RunError(
            "an adapter as Tinker stores it, under names of its own",
            file=file,
            tensor=name,
            expected="the names of transformers and PEFT",
            remedy="convert it: tinker_cookbook.weights.build_lora_adapter(base_model=…, "
            "adapter_path=…, output_path=…); or merge it with build_hf_model there",
        )


# Behind the layer's name, where PEFT keeps the second pair of torch's MultiheadAttention.
ATTENTION_OUT = ".base_layer.out_proj"
IN_PEFT = "serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)"
# PEFT's variants of LoRA, by the key of the configuration: what they compute in evaluation.
PLAIN = "velora_config", "monteclora_config"  # LoRA; they train it in another way
OTHER = {
    "kasa_config": "KaSA takes the smallest singular components out of the base's weight, and "
    "weighs its own",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, stored as their blocks alone",
    "arrow_config": "Arrow routes each token to the adapters that fit it",
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts only behind its invocation",
    "invocation_string": "activated LoRA (aLoRA) acts only behind its invocation",
    "use_qalora": "QA-LoRA sums up groups of the input first",
    "layer_replication": "it was trained on a base with layers repeated",
}
# What a variant stores that only its training reads.
_TRAINING = ("lora_velora_embed", "lora_monteclora_sampler")


def is_variant(config: Mapping[str, object]) -> bool:
    """Whether the tensors beside lora_A and lora_B, if there are any, are of a variant of LoRA
    that PEFT knows."""
    return any(config.get(key) for key in (*PLAIN, *OTHER))


def refuse_variant(config: Mapping[str, object], path: Path) -> None:
    """Raise `RunError` for a variant of LoRA that is no LoRA in evaluation."""
    for key, reason in OTHER.items():
        if config.get(key):
            raise RunError(
                f"a variant of LoRA that is not read ({key}): {reason}",
                file=path,
                found=f"{key}: {str(config[key])[:80]}",
                remedy=IN_PEFT,
            )


def of_training_alone(config: Mapping[str, object], name: str) -> bool:
    """Whether the tensor `name` is one that a variant trains with and evaluates without."""
    variant = any(config.get(key) for key in PLAIN)
    return variant and any(f".{part}" in name for part in _TRAINING)


def known_base(
    said: str | Path | None, named: str | None, revision: str | None = None
) -> BaseModel | None:
    """The base that the user `said`, else the hub model that the run `named`, in its `revision`,
    where it is in the local cache; its paths are not followed."""
    if said is not None:
        return open_base(said)
    if named and not Path(named).is_absolute() and not there(Path(named)):
        try:
            return open_base(named, revision)
        except (MissingError, BaseError):
            pass
    return None


def need_base(options: ReadOptions, what: str, file: Path) -> BaseModel:
    """The base model the user names, for `what` cannot be read without it."""
    if options.base is None:
        raise RunError(
            f"{what} cannot be read without the base model, whose shapes it takes",
            file=file,
            remedy="pass the base with `base`, a folder or a hub id",
        )
    return open_base(options.base)


def linear_shape(base: BaseModel, module: str) -> tuple[int, int]:
    """`[out, in]` of a linear layer of the base, or of a Conv1D, which is stored as `[in, out]`."""
    weight = base.weight(module)
    if weight is None or len(weight.shape) != 2:
        raise BaseError(
            "the base has no such linear layer",
            file=base.path,
            tensor=f"{module}.weight",
            found=None if weight is None else list(weight.shape),
            remedy="is this the base the run was trained on? pass it with `base`",
        )
    rows, columns = weight.shape
    return (columns, rows) if base.is_conv1d(module) else (rows, columns)


class Scaling:
    """Each module's scale, alpha/r or alpha/√r, by the patterns of the configuration."""

    def __init__(self, config: Mapping[str, object], path: Path, options: ReadOptions) -> None:
        self._path = path
        self._config = config
        self._alpha = options.lora_alpha
        self._patterns_in = Patterns()
        self._rank_pattern = self._patterns("rank_pattern")
        self._alpha_pattern = self._patterns("alpha_pattern")

    def _patterns(self, key: str) -> dict[str, float]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or not all(is_number(n) for n in value.values()):
            raise RunError(f"{key} is not a map of numbers", file=self._path, found=value)
        return value

    def _lookup(self, pattern: dict[str, float], module: str, key: str) -> float:
        for name, value in pattern.items():
            try:
                if self._patterns_in.suffix(name, module):
                    return value
            except PatternError as error:
                raise RunError(str(error), file=self._path, found=name) from None
        default = self._config.get(key)
        if not is_number(default):
            raise RunError(
                f"{key} is missing or not a number",
                file=self._path,
                found=default,
                remedy="pass `lora_alpha`" if key == "lora_alpha" else "set it as training had it",
            )
        if not default and key == "lora_alpha":  # as verl's merger writes it, who does not know it
            raise RunError(
                "lora_alpha is 0, by which nothing that was trained counts",
                file=self._path,
                found=default,
                remedy="pass `lora_alpha` as training had it (of verl's it is in the checkpoint's "
                "lora_train_meta.json)",
            )
        return default

    def rank(self, module: str) -> float:
        """The rank that the configuration gives `module`."""
        return self._lookup(self._rank_pattern, module, "r")

    def of(self, module: str, rank: int) -> float:
        """The scale of `module`, whose stored rank is `rank`."""
        said = self.rank(module)
        if said != rank:
            raise RunError(
                "the stored rank differs from the configuration's",
                file=self._path,
                tensor=module,
                found=f"rank {rank} in the weights",
                expected=f"rank {said} by r and rank_pattern",
                remedy="is this the adapter_config.json of another adapter?",
            )
        if self._alpha is not None:
            alpha = self._alpha
        else:
            alpha = self._lookup(self._alpha_pattern, module, "lora_alpha")
        if not rank:
            return 0.0
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
