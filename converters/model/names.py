"""What a module is called: in a run's file, in the class that will be loaded, on disk.

A run may use the names of another version of transformers, of the class without its head
(`AutoModel`), of the text model inside a multimodal one, or of a wrapper around the model. A name
is right when the class that is loaded has it; how else a name may be meant is what transformers'
own loader does with the names of a checkpoint, and nothing more lenient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from .architecture import is_known, known_model
from .base import BaseModel

PEFT_PREFIX = "base_model.model."
# What torch.compile, DDP, FSDP, activation checkpointing and DeepSpeed put into the names of what
# they wrap.
_WRAPPERS = frozenset(
    "_orig_mod module _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module".split()
)
_ADAPTER = re.compile(
    r"\.(lora_(?:[ABE]|embedding_[AB]|magnitude_vector)|trainable_tokens_delta)"
    r"\.(?!weight$|bias$)([^.]+)"
    r"(?=\.weight$|\.bias$|$)"
)
# Linear layers, one for each expert, where gpt-oss has parameters: unsloth's, for bitsandbytes.
_APART = re.compile(r"(.+\.(?:gate_up_proj|down_proj))s\.(\d{1,9})")
# What a sentence-transformers pipeline calls the model in it, today and before its version 5.
_PIPELINE = re.compile(r"^0\.(auto_)?model\.")
# What a module that an adapter is on holds: a weight, itself (a parameter), or the one that torch's
# MultiheadAttention has of queries, keys and values.
_ENDINGS = (".weight", "", ".in_proj_weight")
_SLICE = re.compile(r"(.+)\[(\d{1,9})\]")


def split_slice(name: str) -> tuple[str, int | None]:
    """`experts.gate_up_proj[3]` → (`experts.gate_up_proj`, 3); other names → (name, None)."""
    match = _SLICE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def unwrapped(name: str) -> str:
    """A tensor's name without the segments of wrappers and without PEFT's prefix, however often,
    and what PEFT's model was an attribute of; and without the pipeline that the model was in."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _PIPELINE.sub("", f".{plain}".rpartition(f".{PEFT_PREFIX}")[2].removeprefix("."))


def as_transformers_reads(name: str) -> str:
    """A tensor's name without PEFT's prefix as transformers' own loader drops it: once, and once
    more before a `model.`. Source: PEFT's `build_peft_weight_mapping`."""
    return name.replace(f"{PEFT_PREFIX}model.", "model.", 1).replace(PEFT_PREFIX, "", 1)


def adapter_in(name: str) -> str | None:
    """The name of an adapter inside a tensor's name: `default` in `….lora_A.default.weight`."""
    match = _ADAPTER.search(name)
    return match[2] if match else None


def without_adapter(name: str) -> str:
    """`….lora_A.default.weight` → `….lora_A.weight`."""
    return _ADAPTER.sub(r".\1", name)


class Names:
    """The names of one class of transformers.

    `state`: the shapes of its tensors in memory by name; empty where transformers does not know
    the class, or cannot make it of the base's configuration.
    """

    def __init__(
        self, base: BaseModel, architecture: str | None, num_labels: int | None = None
    ) -> None:
        self._base = base
        self.architecture = architecture
        self._num_labels = num_labels

    @cached_property
    def model(self) -> Any:
        """The class without weights; None where there is none. Raises `BaseError` where
        transformers cannot make it of the configuration."""
        if not is_known(self.architecture, self._base.config):
            return None
        return known_model(str(self.architecture), self._base.config, self._num_labels)

    @cached_property
    def state(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes in memory."""
        if self.model is None:
            return {}
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def conversions(self) -> tuple[list[Any], list[Any]]:
        """What loading does to the names of a checkpoint: renamings, and conversions."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ImportError:
            return [], []  # transformers 4 has the names on disk in memory
        found = get_model_conversion_mapping(self.model)
        converters = [entry for entry in found if isinstance(entry, WeightConverter)]
        return [entry for entry in found if entry not in converters], converters

    def rename(self, name: str) -> tuple[str, str | None]:
        """The parameter that a tensor of a checkpoint becomes (the first of several), and the
        pattern of the conversion that makes it, None for a mere change of name."""
        state, prefix = self.state, self.model.base_model_prefix
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:
            forms = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            return next((form for form in forms if form in state), name), None
        renamed, pattern = rename_source_key(name, *self.conversions, prefix, state)
        if renamed not in state and name in state:
            return name, None
        return renamed, pattern

    def has(self, module: str) -> bool:
        """Whether a module with a weight, or a parameter, has this very name in memory."""
        return any(module + ending in self.state for ending in _ENDINGS)

    def loads(self, module: str) -> bool:
        """Whether transformers' loader finds a weight for a module that a checkpoint calls so."""
        weights = (module + ending for ending in _ENDINGS if ending)
        return any(self.rename(weight)[0] in self.state for weight in weights)

    def tensor(self, name: str) -> str | None:
        """The tensor in memory that is meant by `name`; a name that loading converts, such as an
        expert's, stays as it is. None where the class has nothing of that name."""
        if name in self.state or not self.state:
            return name if self.state else None
        renamed, pattern = self.rename(name)
        if renamed in self.state:
            return renamed if pattern is None else name
        return self._wrapped.get(unwrapped(name))

    def module(self, name: str) -> str | None:
        """As `tensor`, for a key of `Run.updates`: a module, a parameter, or a block of one."""
        stem, _ = split_slice(name)
        for ending in _ENDINGS:
            found = self.tensor(stem + ending)
            if found is not None:
                return found.removesuffix(ending) + name[len(stem) :]
        match = _APART.fullmatch(name)
        found = None if match is None else self.tensor(match[1])
        if match is None or found is None or len(self.state.get(found, ())) != 3:
            return None
        return f"{found}[{match[2]}]"

    def inside(self, key: str) -> str | None:
        """A tensor of an adapter, a module and what is in it, under the module's name in memory;
        None where the class has no such module."""
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            found = self.module(".".join(parts[:end]))
            if found is not None:
                return ".".join((found, *parts[end:]))
        return None

    @cached_property
    def _wrapped(self) -> Mapping[str, str]:
        """The tensors whose own names have a segment that is taken for a wrapper's."""
        return {unwrapped(name): name for name in self.state if unwrapped(name) != name}


def as_peft_loads(names: Names, stored: Mapping[str, str]) -> Mapping[str, str]:
    """Of `stored`, key of a LoRA factor → module: module → the module that PEFT takes it for on
    `names`' class, where that has one. Since transformers 5 PEFT converts old names as loading a
    checkpoint does."""
    keys = {f"{key.rpartition('.lora_')[0]}.lora_A.weight": stored[key] for key in stored}
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )
    except ImportError:
        loaded = keys
    else:
        import torch

        # PEFT hands the tensors on under their new names: the number of rows tells them apart.
        rows = {key: torch.empty(n, 1, device="meta") for n, key in enumerate(keys)}
        modules = list(keys.values())
        found = convert(names.model, LoraConfig(target_modules=modules), rows)
        loaded = {key: modules[tensor.shape[0]] for key, tensor in found.items()}
    ours = {
        module: key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        for key, module in loaded.items()
        if key.startswith(PEFT_PREFIX)
    }
    return {module: name for module, name in ours.items() if names.has(name)}
