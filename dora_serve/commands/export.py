"""`dora-export export RUN OUT --target NAME`."""

from __future__ import annotations

from converters.targets.target import targets

from .by_target import writes

_HELP = """Write RUN for any installed target, ours or another distribution's.

`--target NAME --help` shows the options of NAME."""

command = writes("export", _HELP, list(targets()))
