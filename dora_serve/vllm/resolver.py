"""A vLLM LoRA resolver: a request may name a training run, which is converted once and served.

Interface: vllm-project/vllm `vllm/lora/resolver.py`, `vllm/entrypoints/openai/models/serving.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from converters.errors import DoraExportError, TargetError
from converters.model.base import open_base

from ..folder.inventory import Member, find_run, read_member
from ..folder.names import own_name
from .convert import vllm_adapter
from .fleet import ranks_of

_INTERVAL = 1.0  # between two looks at the files of the runs in use
_TOGETHER = ({"q_proj", "k_proj", "v_proj", "qkv_proj"}, {"gate_proj", "up_proj", "gate_up_proj"})

logger = init_logger("vllm.dora_serve")


@dataclass
class _Served:
    """A run in use: where it is, as what it was read, what was made of it, and why what it became
    since cannot be."""

    base: str
    path: Path
    member: Member
    adapter: Path
    complaint: str = ""


class RunResolver(LoRAResolver):  # type: ignore[misc]
    """Serves the runs and adapters below `root`, by their path below it or by their own name where
    no other has it. A run that changes is converted anew, and the next request gets it.
    `any_base`: also those that name another base than the server's and fit it."""

    def __init__(self, root: Path, *, any_base: bool = False) -> None:
        self.root = root.resolve()
        self._any_base = any_base
        self.models: Any = None  # vLLM's table of adapters, known from the first request on
        self._served: dict[str, _Served] = {}
        self._watching: asyncio.Task[None] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of the run called `lora_name`, None when there is none.

        Raises `VLLMValidationError`, an answer 400, when the run cannot be served.
        """
        path = find_run(self.root, lora_name)
        if path is None:
            return None
        try:
            made = await asyncio.to_thread(self._make, base_model_name, lora_name, path)
        except DoraExportError as error:
            logger.warning("run %s cannot be served: %s", lora_name, error)
            raise VLLMValidationError(_message(error), parameter="model") from None
        self._served[lora_name] = made
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        # vLLM puts its own number in the place of the 1.
        return LoRARequest(lora_name, 1, str(made.adapter), base_model_name=base_model_name)

    def _make(self, base: str, name: str, path: Path) -> _Served:
        known = open_base(base)
        member = read_member(name, path, [known], known if self._any_base else None)
        if str(member.base.path) != str(known.path):
            raise TargetError(
                f"the run {name} is of another base than the server's",
                found=member.run.base,
                expected=own_name(known.path),
            )
        for warning in member.run.warnings:
            logger.warning("run %s: %s", name, warning)
        self._check(member)
        return _Served(base, path, member, vllm_adapter(member))

    def _check(self, member: Member) -> None:
        """Raise `TargetError` when the server's slots have no room for the run."""
        ranks = ranks_of(member)
        config = getattr(getattr(self.models, "engine_client", None), "vllm_config", None)
        lora = getattr(config, "lora_config", None)
        if lora is None:
            return
        largest = max(ranks.values(), default=1)
        if largest > lora.max_lora_rank:
            raise TargetError(
                f"the run {member.name} needs a higher --max-lora-rank",
                found=largest,
                expected=f"at most {lora.max_lora_rank}",
            )
        targets = set(lora.target_modules or ())
        kinds = {module.rsplit(".", 1)[-1] for module in ranks}
        served = targets.union(*(group for group in _TOGETHER if group & targets))
        if targets and not kinds <= served:
            raise TargetError(
                f"the run {member.name} adapts modules without slots (--lora-target-modules)",
                found=", ".join(sorted(kinds - served)),
                expected=", ".join(sorted(served)),
            )

    async def _watch(self) -> None:
        """Let go of runs that changed or went, so that the next request resolves them anew."""
        while True:
            await asyncio.sleep(_INTERVAL)
            for name, served in list(self._served.items()):
                if not served.member.changed():
                    continue
                try:
                    if served.path.is_dir():
                        made = await asyncio.to_thread(self._make, served.base, name, served.path)
                        self._served[name] = made
                        if made.adapter == served.adapter:
                            continue
                    else:
                        del self._served[name]
                except Exception as error:  # half written, perhaps: the old one serves on
                    if str(error) != served.complaint:
                        logger.warning("run %s changed, but cannot be served: %s", name, error)
                    served.complaint = str(error)
                    continue
                if self.models is not None:
                    self.models.lora_requests.pop(name, None)
                logger.info("run %s changed", name)


def _message(error: DoraExportError) -> str:
    """The error as a client may read it: in one line, without where the files lie."""
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(
        f"file: {Path(line).name}" if line.startswith("file: ") else line for line in lines
    )


def tell_models(resolver: RunResolver) -> None:
    """Let `resolver` know vLLM's table of adapters, from the first request that needs it on.

    vLLM asks a resolver only for names that are not in the table, so a run that changed has to be
    taken out of it, and only the table's owner knows the limits the server was started with.
    """
    original = OpenAIServingModels.resolve_lora

    async def resolve_lora(self: Any, lora_name: str) -> Any:
        resolver.models = self
        return await original(self, lora_name)

    OpenAIServingModels.resolve_lora = resolve_lora
