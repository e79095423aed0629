"""What trainers leave in pieces, or under names of their own, and how a run is made of it."""

from __future__ import annotations

from pathlib import Path

from ..errors import RunError

_THEN = (
    "; what comes out of an adapter's training is its adapter_model.bin (or .safetensors), beside "
    "its adapter_config.json"
)
_XTUNER = (
    "a checkpoint of xtuner (mmengine), whose scales are in its configuration in Python",
    "convert it: xtuner convert pth_to_hf CONFIG THIS_PTH OUT, and give OUT, an adapter of PEFT "
    "(of LLaVA its llm_adapter)",
)
_MEGATRON = (
    "a checkpoint in pieces of Megatron",
    "make a Hugging Face folder of it with the converter of what trained it: export_ckpt of "
    "Megatron Bridge's AutoBridge, or of NeMo's llm (merge LoRA first: llm.peft.merge_lora); then "
    "`extract` makes an adapter of it",
)
_TRAINERS = {  # what they leave that no reader opens, and how it becomes what one does
    "iter_*.pth": _XTUNER,  # with DeepSpeed a folder of its pieces
    "epoch_*.pth": _XTUNER,
    "common.pt": _MEGATRON,  # beside its shards, which torch.distributed alone does not join
    "latest_checkpointed_iteration.txt": _MEGATRON,
    "*.nemo": (
        "an archive of NeMo, which no reader opens",
        "convert it with NeMo: of LoRA merge it into its base first (merge_lora), then export that "
        "to a Hugging Face folder (llm.export_ckpt, or scripts/checkpoint_converters of the 1.x "
        "versions); then `extract` makes an adapter of it",
    ),
    "pytorch_lora_weights.*": (
        "a LoRA of diffusers, for the parts of a pipeline that makes images",
        "merge it there: pipe.load_lora_weights(FOLDER), pipe.fuse_lora() and "
        "pipe.save_pretrained(OUT); its text encoders in OUT are models of transformers",
    ),
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
