"""How a server is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dora_serve.onnxruntime.limits import Limits


@dataclass(frozen=True)
class ServerOptions:
    """`threads` of each engine, None for one per core. `max_length`: tokens of a prompt and its
    completion, None for the model's context. `max_body`: bytes of a request. `timeout`: seconds
    from a request to the end of its answer. `workers`: batches of an encoder that run at once."""

    threads: int | None = None
    max_length: int | None = None
    max_body: int = 4 << 20
    timeout: float = 600
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
