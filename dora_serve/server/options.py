"""How a server is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dora_serve.onnxruntime.limits import Limits


@dataclass(frozen=True)
class ServerOptions:
    """`threads` of each engine, None for one per core. `max_length`: tokens of a prompt and its
    completion, None for the model's context. `max_body`: bytes of a request. `timeout`: seconds
    from a request to the end of its answer. `workers`: batches of an encoder that run at once.
    `precision` of the graphs that are made: fp32, int8, int4, or auto, as the memory allows.
    `generation_config`: as vLLM's; `chat_template`: the file of the one that every decoder has in
    place of its own."""

    threads: int | None = None
    max_length: int | None = None
    max_body: int = 4 << 20
    timeout: float = 600
    workers: int = 1
    precision: str = "auto"
    generation_config: str = "auto"
    chat_template: str | None = None
    limits: Limits = field(default_factory=Limits)
