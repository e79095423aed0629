"""A vLLM LoRA resolver: a request may name a training run, which is converted once and served, and
followed from then on, as are the runs that the server was started with.

Interface: vllm-project/vllm `vllm/lora/resolver.py`, `vllm/entrypoints/openai/models/serving.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from converters.errors import DoraExportError, MissingError, TargetError, visible
from converters.files.cache import cache_folder
from converters.files.handles import real
from converters.model.base import open_base

from ..folder.inventory import Member
from .desired import PATIENCE, SETTLE, UNREAD, Following, Wanted
from .fleet import ranks_of, with_whole_layers
from .table import Table

_INTERVAL = 0.5  # seconds between two looks at the files of the runs in use

logger = init_logger("vllm.dora_serve")


class RunResolver(LoRAResolver):  # type: ignore[misc]
    """Serves the runs and adapters below `root`, by their names or by their paths below it, as
    `Following` has them. `any_base`: also those that name another base than the server's and fit
    it. `keep`: what can no longer be served goes on as it was."""

    def __init__(self, root: Path, table: Table, *, any_base: bool, keep: bool) -> None:
        self._root, self._table = root, table
        self._any_base, self._keep = any_base, keep
        self._following: Following | None = None  # from the start of the server on
        self._given: set[str] = set()  # names that were ever served from here
        self._failed: dict[str, str] = {}  # name → the folder that the engine did not load
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None
        # Of their own, since the few threads of the loop are for what is over at once; and each
        # without threads of torch, which would wait for each other and for vLLM's at every step.
        self._conversions = ThreadPoolExecutor(
            2, "dora-serve conversion", torch.set_num_threads, (1,)
        )

    async def started(self, failed: Mapping[str, str]) -> None:
        """Follow what the server was started with and what lies in our cache. `failed`: name → path
        of what the engine did not load."""
        models = self._table.models
        try:
            # Of a hub id vLLM serves the revision that it was told.
            base = open_base(models.model_config.model, models.model_config.revision)
        except DoraExportError as error:
            logger.error("no training run is served: %s", error)
            return
        self._following = Following(
            self._root,
            given=base if self._any_base else None,
            server=base,
            reserved=[path.name for path in models.base_model_paths],
            check=self._check,
            keep=self._keep,
        )
        ours = cache_folder().resolve()
        paths = {**self._table.paths(), **failed}.items()
        self._given = {name for name, path in paths if ours in Path(path).resolve().parents}
        self._failed = {name: path for name, path in failed.items() if name in self._given}
        self._loop = asyncio.create_task(self._follow(self._following))

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of the run called `lora_name`, None when there is none.

        Raises `VLLMValidationError`, an answer 400, when the run cannot be served.
        """
        wanted = await self._now(lora_name)
        if wanted is None:
            return None
        for warning in wanted.warnings:
            logger.warning("run %s: %s", lora_name, visible(warning))
        if wanted.adapter is None:
            logger.warning("run %s cannot be served: %s", lora_name, wanted.problem)
            raise VLLMValidationError(wanted.problem, parameter="model")
        self._given.add(lora_name)
        # vLLM puts its own number in the place of the 1.
        return LoRARequest(lora_name, 1, str(wanted.adapter), base_model_name=base_model_name)

    async def _now(self, name: str) -> Wanted | None:
        """What is wanted of the run, which is waited for while somebody writes it. No thread waits:
        with a few such runs none would be left for the requests for others."""
        following, end = self._following, time.monotonic() + PATIENCE
        if following is None:
            return None
        if not await asyncio.to_thread(self._find, following, name):
            why = following.odd(name)
            return None if why is None else Wanted(None, why)
        while time.monotonic() < end:
            if await asyncio.to_thread(following.changed, [name]):
                await self._convert(following, name)
            wanted = following.settled(name)
            if wanted is not UNREAD:
                return wanted
            await asyncio.sleep(SETTLE)
        return UNREAD

    def _find(self, following: Following, name: str) -> bool:
        with suppress(MissingError):
            return following.find(name)
        return False

    async def _convert(self, following: Following, name: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._conversions, following.renew, name)

    async def _follow(self, following: Following) -> None:
        """Keep vLLM's table equal to what is wanted. It is compared anew each time, since vLLM may
        enter a name a while after it was given here."""
        for name in list(self._given):
            with suppress(MissingError):
                await asyncio.to_thread(following.find, name)
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                names = self._given & {*self._table.paths(), *self._failed} - self._busy.keys()
                for name in await asyncio.to_thread(following.changed, names):
                    self._busy[name] = asyncio.create_task(self._renew(following, name))
                for name in names - self._busy.keys():
                    await self._compare(following, name)
            except Exception:
                logger.exception("the runs in use")

    async def _renew(self, following: Following, name: str) -> None:
        try:
            await self._convert(following, name)
        finally:
            del self._busy[name]

    async def _compare(self, following: Following, name: str) -> None:
        wanted = following.current(name)
        if wanted is UNREAD:
            return
        if wanted is None or wanted.adapter is None:
            # The next request asks the resolver, which says why.
            self._failed.pop(name, None)
            if self._table.remove(name):
                reason = "it is gone" if wanted is None else wanted.problem
                logger.warning("run %s is no longer served: %s", name, reason)
            return
        path = str(wanted.adapter)
        # `watch` has its own links to the same places: each would load after the other for ever.
        served = self._table.paths().get(name, "")
        if path == self._failed.get(name) or real(Path(served)) == real(wanted.adapter):
            return
        failure = await self._table.put(name, path)
        self._failed.pop(name, None)
        if failure:
            self._failed[name] = path
            if not self._keep:
                self._table.refuse(name, failure)

    def _check(self, member: Member) -> None:
        """Raise `TargetError` when the server's slots have no room for the run."""
        ranks = ranks_of(member)
        config = getattr(self._table.models.engine_client, "vllm_config", None)
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
        kinds = {module.rsplit(".", 1)[-1] for module in ranks}
        served = with_whole_layers(lora.target_modules or ())
        if served and not kinds <= served:
            raise TargetError(
                f"the run {member.name} adapts modules without slots (--lora-target-modules)",
                found=", ".join(sorted(kinds - served)),
                expected=", ".join(sorted(served)),
            )
