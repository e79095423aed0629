"""vLLM's table of adapters, kept such that a request computes wholly with one run's weights.

What vLLM 0.32 does by itself (`vllm/entrypoints/openai/models/serving.py`, `vllm/lora/`):

- `load_inplace` puts the new weights under the old id, so a request that is running goes on with
  them, what it leaves in the prefix cache stands under the old path, and the files are read again
  at every step, for good. Here a load in place takes a new id, and the name is switched to it at
  one moment; requests that are running end with the old one, which vLLM lets go as the least
  recently used.
- Two versions of one name in one step are one to it, since it compares requests for adapters by
  name. Here they are compared by name and id.
- Every API server of one engine counts its ids from 1. Here each has numbers of its own.
- A name that is not served is unknown, whatever the reason. Here a client is told the reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.utils.counter import AtomicCounter

from .watch import refusal_at

_IDS = 1 << 20  # of one API server; vLLM keeps them in 32 bits

logger = init_logger("vllm.dora_serve")


class Table:
    """The names that are served. `models`: vLLM's own, there once the server starts."""

    def __init__(self) -> None:
        self.models: Any = None
        self._refused: dict[str, str] = {}

    def adopt(self, models: Any) -> None:
        """Keep `models`, which has loaded nothing yet."""
        self.models = models
        config = getattr(models.engine_client, "vllm_config", None)
        rank = getattr(getattr(config, "parallel_config", None), "_api_process_rank", 0)
        models.lora_id_counter = AtomicCounter(max(rank, 0) * _IDS)

    def paths(self) -> dict[str, str]:
        """Name → the path that an adapter was loaded from."""
        return {name: request.lora_path for name, request in self.models.lora_requests.items()}

    async def put(self, name: str, path: str, **more: Any) -> str:
        """Serve the adapter at `path` by `name` from now on. Why not, where that cannot be; then
        all stays as it was."""
        models = self.models
        async with models.lora_resolver_lock[name]:
            if models.is_base_model(name):
                return f"{name} is the name of the base"
            request = LoRARequest(name, models.lora_id_counter.inc(1), path, **more)
            try:
                await models.engine_client.add_lora(request)
            except Exception as error:
                return str(error)
            models.lora_requests[name] = request
            self.forgive(name)
        logger.info("%s is served from %s, id %d", name, path, request.lora_int_id)
        return ""

    def refuse(self, name: str, reason: str) -> None:
        """Answer requests for `name` with the reason."""
        self.remove(name)
        self._refused[name] = reason

    def remove(self, name: str) -> bool:
        """Let `name` go; whether it was here."""
        refused = self._refused.pop(name, None)
        return self.models.lora_requests.pop(name, refused) is not None

    def refusal(self, name: str) -> str | None:
        """Why `name` is refused."""
        return self._refused.get(name)

    def forgive(self, name: str) -> None:
        """Refuse `name` no more."""
        self._refused.pop(name, None)


class _Refusals(LoRAResolver):  # type: ignore[misc]
    def __init__(self, table: Table) -> None:
        self._table = table

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:  # noqa: ARG002
        reason = self._table.refusal(lora_name)
        if reason is not None:
            raise VLLMValidationError(f"{lora_name}: {reason}", parameter="model")
        return None


def tell_versions_apart() -> None:
    """Let two versions of one name be two adapters in a step. In every process of vLLM."""

    def equal(one: LoRARequest, other: object) -> bool:
        return isinstance(other, LoRARequest) and _identity(one) == _identity(other)

    LoRARequest.__eq__ = equal
    LoRARequest.__hash__ = lambda self: hash(_identity(self))


def _identity(request: LoRARequest) -> tuple[str, int]:
    return request.lora_name, request.lora_int_id


def install(table: Table, started: Callable[[Mapping[str, str]], Awaitable[None]] | None) -> None:
    """Let vLLM's own endpoints act upon `table`. `started` is awaited once vLLM has loaded what its
    command line names, with what of it did not load, name → path."""
    cls: Any = OpenAIServingModels
    load, unload = cls.load_lora_adapter, cls.unload_lora_adapter

    async def init_static_loras(self: Any) -> None:
        table.adopt(self)
        failed = {}
        for module in self.static_lora_modules or ():
            request = LoadLoRAAdapterRequest(
                lora_name=module.name,
                lora_path=module.path,
                is_3d_lora_weight=module.is_3d_lora_weight,
            )
            done = await load(self, request, base_model_name=module.base_model_name)
            if isinstance(done, ErrorResponse):  # which would keep all others down
                logger.error("%s cannot be served: %s", module.name, done.error.message)
                table.refuse(module.name, done.error.message)
                failed[module.name] = module.path
        if started is not None:
            await started(failed)

    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        name, path = request.lora_name, request.lora_path
        reason = refusal_at(path)
        if reason is not None:
            table.refuse(name, reason)
            return f"Success: requests for '{name}' are refused."
        if request.load_inplace:
            more = {"is_3d_lora_weight": request.is_3d_lora_weight}
            failure = await table.put(name, path, base_model_name=base_model_name, **more)
            return create_error_response(failure) if failure else f"Success: '{name}' is switched."
        done = await load(self, request, base_model_name)
        if isinstance(done, str):
            table.forgive(name)
        return done

    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        if table.refusal(request.lora_name) is None:
            return await unload(self, request)
        table.remove(request.lora_name)
        return f"Success: requests for '{request.lora_name}' are refused no more."

    cls.init_static_loras = init_static_loras
    cls.load_lora_adapter = load_lora_adapter
    cls.unload_lora_adapter = unload_lora_adapter
    LoRAResolverRegistry.register_resolver("dora-serve refusals", _Refusals(table))
