"""The entry point that vLLM loads in each of its processes (group `vllm.general_plugins`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fleet import Pool
    from .resolver import RunResolver
    from .table import Table

RUNS = "DORA_SERVE_RUNS"
ANY_BASE = "DORA_SERVE_ANY_BASE"
KEEP = "DORA_SERVE_KEEP"
_ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def live_environment(pool: Pool, runs: str, *, keep: bool = False) -> dict[str, str]:
    """What a vLLM that serves `pool` needs to serve the runs in the folder `runs` by name. They
    may name another base where the user gave the pool's. `keep`: those that can no longer be
    served go on as they were."""
    known = {_ALLOW: "1", RUNS: runs}
    said = {ANY_BASE: pool.any_base, KEEP: keep}
    return {**known, **{name: "1" for name, so in said.items() if so}}


def register() -> None:
    """Mend what vLLM does with adapters (`cpu`, `table`), and register the resolver for the runs
    below `$DORA_SERVE_RUNS`, where that is set; with `$DORA_SERVE_ANY_BASE` for those too that name
    another base than the server's; with `$DORA_SERVE_KEEP` a run that can no longer be served goes
    on as it was."""
    from vllm.logger import init_logger

    from .cpu import skip_rows_without_adapter

    logger = init_logger("vllm.dora_serve")
    if skip_rows_without_adapter():
        logger.info_once("rows without an adapter are kept free of other rows' adapters")
    if os.environ.get(_ALLOW) not in ("1", "true", "True"):
        if os.environ.get(RUNS):
            logger.warning("%s needs %s=1: vLLM asks no resolver without it", RUNS, _ALLOW)
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from .table import Table, install, tell_versions_apart

    tell_versions_apart()
    if "dora-serve refusals" in LoRAResolverRegistry.get_supported_resolvers():
        return  # vLLM registers more than once in a process
    table = Table()
    resolver = _resolver(table, logger)
    install(table, None if resolver is None else resolver.started)
    if resolver is not None:
        LoRAResolverRegistry.register_resolver("dora-serve", resolver)


def _resolver(table: Table, logger: Any) -> RunResolver | None:
    root = os.environ.get(RUNS)
    if not root:
        return None
    from .resolver import RunResolver

    if not Path(root).is_dir():
        logger.error("%s=%s is not a folder: no training run is served", RUNS, root)
        return None
    return RunResolver(
        Path(root),
        table,
        any_base=os.environ.get(ANY_BASE) == "1",
        keep=os.environ.get(KEEP) == "1",
    )
