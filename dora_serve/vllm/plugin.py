"""The entry point that vLLM loads in each of its processes (group `vllm.general_plugins`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .fleet import Pool

RUNS = "DORA_SERVE_RUNS"
ANY_BASE = "DORA_SERVE_ANY_BASE"
_ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def live_environment(pool: Pool, runs: str) -> dict[str, str]:
    """What a vLLM that serves `pool` needs to serve the runs in the folder `runs` by name. They
    may name another base where the user gave the pool's."""
    known = {_ALLOW: "1", RUNS: runs}
    return {**known, ANY_BASE: "1"} if pool.any_base else known


def register() -> None:
    """Mend vLLM's LoRA operators for CPUs, and register the resolver for the runs below
    `$DORA_SERVE_RUNS`, where that is set; with `$DORA_SERVE_ANY_BASE` for those too that name
    another base than the server's."""
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
    resolver = RunResolver(Path(root), any_base=os.environ.get(ANY_BASE) == "1")
    tell_models(resolver)
    LoRAResolverRegistry.register_resolver("dora-serve", resolver)
