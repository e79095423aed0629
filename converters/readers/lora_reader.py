"""What the readers of LoRA's relatives share: modules of a few tensors each, a number or two that
scale them, and the rest of the file.

A method's own file says which folders are its runs, which tensors belong to a module, and the
formula: `adapt` checks one module and returns how it is read. Everything else is here.

They lie in an adapter folder, or in a checkpoint with config.json and the weights of the whole
model (or of what was trained), whose frozen weights tell whether a base is the right one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import MissingError, RunError
from ..files.json_files import is_number
from ..files.tensors import LazyTensors
from ..model.tasks import labels_of, task_of
from ..run import LazyUpdates, Run
from ..updates.update import Update
from .module import AdaptedModule, Modules
from .peft_common import check_saved, origin, refuse_unread
from .run_folder import CONFIG_FILE, RunFolder

# Constants that older versions of transformers saved; its present models do not know them.
_BUFFER = re.compile(r".*\.(position_ids|masked_bias|rotary_emb\.inv_freq)")


class Adaptation(NamedTuple):
    """How one module is read: the rank that training began with, what makes the update, and the
    `[out, in]` of its weight where that is not the shape of its pair."""

    start_rank: int
    load: Callable[[], Update]
    shape: tuple[int, int] | None = None


class LoraFiles(ABC):
    """The files of a run: the tensors by name, and the configuration beside them."""

    config: Mapping[str, object]
    config_path: Path
    tensors: LazyTensors

    def number(self, keys: tuple[str, ...], said: float | None, option: str) -> float:
        """What the user `said`, else the first of `keys` in the configuration; raises `RunError`
        unless it is positive."""
        config = self.config
        value = said if said is not None else next((config[k] for k in keys if k in config), None)
        if not is_number(value) or value <= 0:
            raise RunError(
                f"the run's {keys[0]} is not known",
                file=self.config_path,
                found=f"{value}",
                expected=f"a positive number as {' or '.join(keys)}",
                remedy=f"pass `{option}`",
            )
        return value

    def alpha(self, said: float | None) -> float:
        return self.number(("lora_alpha",), said, "lora_alpha")

    def run(
        self,
        method: str,
        modules: Modules,
        adapt: Callable[[AdaptedModule], Adaptation],
        options: Mapping[str, object] | None = None,
    ) -> Run:
        """The run whose adapted `modules` are read as `adapt` says; `options` is what was chosen
        to read it."""
        read = {name: adapt(module) for name, module in modules.items()}
        own = {tensor.name for module in modules.values() for tensor in module.parts.values()}
        return replace(
            self.rest(own, modules),
            method=method,
            updates=LazyUpdates(
                {name: how.load for name, how in read.items()},
                {name: how.shape or modules[name].shape for name, how in read.items()},
            ),
            start_rank={name: how.start_rank for name, how in read.items()},
            kernels={name: module.kernel for name, module in modules.items() if module.kernel},
            options=options or {},
        )

    @abstractmethod
    def rest(self, own: set[str], modules: Collection[str]) -> Run:
        """The run but for its updates, which are for `modules` and made of the tensors `own`."""


class AdapterFiles(LoraFiles):
    """An adapter folder of PEFT or of one of its forks."""

    def __init__(self, folder: RunFolder) -> None:
        self.config, self.tensors = folder.adapter_config, folder.adapter
        self.config_path = folder.path / CONFIG_FILE
        self._folder = folder

    def rest(self, own: set[str], modules: Collection[str]) -> Run:
        file = self._folder.adapter_file
        if file is None:
            raise MissingError("the adapter went while it was read", file=self._folder.path)
        whole = {
            name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", "."): tensor
            for name, tensor in self.tensors.items()
            if tensor.name not in own
        }
        refuse_unread(whole, file)
        check_saved(self.config, modules, self.config_path)
        # An adapter on an embedding or head may carry its weight along: untouched, or resized.
        heads = {n: t for n, t in whole.items() if n.removesuffix(".weight") not in modules}
        return Run(
            path=self._folder.path,
            method="",
            updates={},
            replaced=whole,
            **origin(self.config, heads),
            files=(*self._folder.adapter_files, self.config_path),
        )


class CheckpointFiles(LoraFiles):
    """A checkpoint folder as transformers saves it.

    Every tensor that no update is made of counts as trained; a writer drops those that equal the
    base's. `names` gives a stored tensor the name that the model in memory has for it.
    """

    def __init__(self, folder: RunFolder, names: Callable[[str], str] = str) -> None:
        checkpoint = folder.checkpoint
        assert checkpoint is not None  # or `detect` would not have taken it
        self.config, self.tensors = checkpoint.config, checkpoint.tensors
        self.config_path = checkpoint.path / "config.json"
        self._checkpoint, self._names = checkpoint, names

    def rest(self, own: set[str], modules: Collection[str]) -> Run:
        rest = {
            self._names(name): tensor
            for name, tensor in self.tensors.items()
            if name not in own and tensor.dtype.is_floating_point and not _BUFFER.fullmatch(name)
        }
        frozen = {f"{module}.weight" for module in modules}
        task = task_of(self.config)
        base = self.config.get("_name_or_path")
        return Run(
            path=self._checkpoint.path,
            method="",
            updates={},
            replaced={name: tensor for name, tensor in rest.items() if name not in frozen},
            embedded_base=rest if frozen <= rest.keys() else None,
            base=str(base) if base else None,
            task=task,
            num_labels=labels_of(rest) if task == "sequence-classification" else None,
            files=(*self._checkpoint.shards, self.config_path),
        )
