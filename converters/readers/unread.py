"""What a run of PEFT has that no reader reads: files beside the adapter, and switches in its
configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import RunError
from .run_folder import CONFIG_FILE, RunFolder
from .unsloth import DETAIL

# Switches that a reader reads, or that say nothing of the weights.
_SWITCHES = frozenset(
    "inference_mode init_lora_weights fan_in_fan_out use_rslora use_dora use_mora lora_bias "
    "ensure_weight_tying dora_simple".split()
)
_SETTINGS = frozenset(("auto_mapping", "rank_pattern", "alpha_pattern", DETAIL))
# Beside the adapter's own file; PEFT loads none of them.
_VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
# TRL's value model beside an adapter is saved as if it were the whole model.
_WHOLE = ("pytorch_model.bin", "model.safetensors")
_V_HEAD = "v_head."
_PARTS = {
    "new_embeddings.safetensors": "rows of the embedding for tokens that training added",
    "new_embeddings.bin": "rows of the embedding for tokens that training added",
    "non_lora_trainables.safetensors": "modules that were trained beside the adapter",
    "non_lora_trainables.bin": "modules that were trained beside the adapter",
    "trainable_params.bin": "embeddings and norms that were trained beside the adapter (LongLoRA)",
    "vpm_resampler_embedtokens.pt": "the vision tower, the resampler and the embedding, trained "
    "beside the adapter (MiniCPM-V)",
}
_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
# Files of tensors that say nothing more of what was trained: the model's own, and the trainer's.
_OTHERS = tuple(
    "adapter model pytorch_model consolidated ft-model hf_model meta_model optimizer scheduler "
    "rng_state random_states training_args scaler sampler dataloader custom_checkpoint "
    "recipe_state prune_state_dict record_dict".split()
)


def not_read(folder: RunFolder) -> list[str]:
    """A warning of each thing. Raises `RunError` for trained parts that the result would lack."""
    for name, meaning in _PARTS.items():
        if folder.has(name):
            raise RunError(
                f"the run has a part that is not read: {meaning}",
                file=folder.path / name,
                remedy="put it into the base and name that as `base`, or train and save it with "
                "PEFT's modules_to_save; where it is not needed, take the file away",
            )
    heads = [
        f"{name} is left out: the head of a reward or value model, which no target has"
        for name in (*_VALUE_HEADS, *_WHOLE)
        if folder.has(name)
        and (name in _VALUE_HEADS or any(n.startswith(_V_HEAD) for n in folder.tensors(name)))
    ]
    others = [
        f"{name} lies beside the adapter and is not read: where it was trained too, the result "
        "lacks it"
        for name in sorted(path.name for path in folder.path.iterdir() if path.is_file())
        if name.endswith(_TENSORS) and name not in _VALUE_HEADS and not name.startswith(_OTHERS)
    ]
    return [*heads, *others, *_others_below(folder), *_unknown(folder.adapter_config or {})]


def _others_below(folder: RunFolder) -> Iterator[str]:
    """A warning that names the adapters in folders below: of a model with several, PEFT saves the
    one called default into the folder itself, and each other one below it. A trainer's checkpoints,
    and links, are earlier states of the same."""
    below = [
        each.path.name
        for each in map(folder.below, _folders(folder.path))
        if each.has(CONFIG_FILE) and each.adapter_files
    ]
    if below:
        yield (
            f"{', '.join(below)} below the adapter: another adapter each, which is left out; to "
            f"take one, give its folder as the run, such as {folder.path / below[0]}"
        )


def _folders(path: Path) -> list[str]:
    return sorted(
        each.name
        for each in path.iterdir()
        if each.is_dir()
        and not each.is_symlink()
        and not each.name.startswith(("checkpoint-", "."))
    )


def _unknown(config: Mapping[str, object]) -> Iterator[str]:
    """A warning that names the switches nobody here knows, and settings that PEFT does not. Of
    other tuners PEFT knows its own switches."""
    switches = {key for key, value in config.items() if value is True} - _SWITCHES
    settings = {key for key, value in config.items() if value and isinstance(value, dict)}
    settings -= _SETTINGS
    kind = str(config.get("peft_type") or "LORA")
    if not (settings or (switches and kind != "LORA")):
        names = switches  # without PEFT, which takes seconds to be imported
    else:
        try:
            from peft import PEFT_TYPE_TO_CONFIG_MAPPING

            fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__.keys()
            names = (settings - fields) | (switches if kind == "LORA" else switches - fields)
        except (ImportError, KeyError):
            names = switches if kind == "LORA" else set()  # its reader knows its switches
    if names:
        yield (
            f"{CONFIG_FILE} switches on what is not known here: {', '.join(sorted(names))}; if it "
            "changes what the adapter computes, the result is wrong"
        )
