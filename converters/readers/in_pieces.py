"""What trainers leave in pieces, or under names of their own, and how a run is made of it."""

from __future__ import annotations

from pathlib import Path

from ..errors import RunError

_THEN = (
    "; what comes out of an adapter's training is its adapter_model.bin (or .safetensors), beside "
    "its adapter_config.json"
)
_TRAINERS = {  # what they leave that no reader opens, and how it becomes what one does
    "*.distcp": (
        "a checkpoint in shards of FSDP or torch.distributed, which no reader opens",
        "put them together: accelerate merge-weights FOLDER OUT (Trainer, axolotl), or python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT{_THEN}",
    ),
    "pytorch_model_fsdp.bin": (
        "a checkpoint that FSDP put together, under a name that no reader looks for",
        "copy it to pytorch_model.bin beside the config.json of what was trained; of an adapter's "
        "training, to adapter_model.bin beside its adapter_config.json",
    ),
    "zero_to_fp32.py": (
        "a checkpoint in pieces of DeepSpeed, one for each process",
        f"put them together: python zero_to_fp32.py . OUT, in this folder{_THEN}",
    ),
    "*_model_states.pt": (
        "a checkpoint in pieces of DeepSpeed, one for each process",
        "put them together: python -m deepspeed.utils.zero_to_fp32 FOLDER OUT, where FOLDER holds "
        f"the file `latest`{_THEN}",
    ),
    "model_world_size_*_rank_*.pt": (
        "a checkpoint in pieces of verl, one for each process",
        "put them together with verl's own merger (`python -m verl.model_merger merge`, of the "
        "folder); of LoRA's training give the `lora_adapter` that it makes then, with the "
        "`lora_alpha` of lora_train_meta.json",
    ),
    "latest_checkpointed_iteration.txt": (
        "a checkpoint in pieces of Megatron",
        "make a Hugging Face folder of it with the converter of what trained it (Megatron Bridge, "
        "NeMo)",
    ),
    "adapters.npz": (
        "an adapter of an early mlx-lm, whose configuration is not beside it",
        "train it with a newer mlx-lm, or fuse it there (mlx_lm.fuse), then `extract`",
    ),
}


def in_pieces(path: Path) -> RunError | None:
    """The error for the folder `path` where a trainer left something else there than a run."""
    for pattern, (message, remedy) in _TRAINERS.items():
        found = next((p for each in (pattern, f"*/{pattern}") for p in path.glob(each)), None)
        if found is not None:
            return RunError(message, file=path, found=str(found.relative_to(path)), remedy=remedy)
    return None
