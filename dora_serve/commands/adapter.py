"""`dora-export adapter RUN OUT`."""

from __future__ import annotations

from .by_target import adapters, writes

_HELP = """Repack RUN as an adapter OUT with another rank in every module.

With --base, names, shapes and frozen weights are checked against it. Without one of --max-rank,
--energy and --budget the adapter is the whole update, exactly."""

command = writes("adapter", _HELP, adapters(), "peft")
