"""The entry point that vLLM loads in each of its processes (group `vllm.general_plugins`)."""

from __future__ import annotations

import os
from pathlib import Path

RUNS = "DORA_SERVE_RUNS"
_ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def register() -> None:
    """Mend vLLM's LoRA operators for CPUs, and register the resolver for the runs below
    `$DORA_SERVE_RUNS`, where that is set."""
    from vllm.logger import init_logger

    from .cpu import skip_rows_without_adapter

    logger = init_logger("vllm.dora_serve")
    if skip_rows_without_adapter():
        logger.info_once("rows without an adapter are kept free of other rows' adapters")
    root = os.environ.get(RUNS)
    if not root:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from .resolver import RunResolver, tell_models

    if not Path(root).is_dir():
        logger.error("%s=%s is not a folder: no training run is served", RUNS, root)
        return
    if os.environ.get(_ALLOW) not in ("1", "true", "True"):
        logger.warning("%s needs %s=1: vLLM asks no resolver without it", RUNS, _ALLOW)
    resolver = RunResolver(Path(root))
    tell_models(resolver)
    LoRAResolverRegistry.register_resolver("dora-serve", resolver)
