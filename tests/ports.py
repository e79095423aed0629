"""Ports that are free, and still are when a server comes up."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below those that the system itself gives out, of which another process may have been given one
# in the minute until vLLM opens it.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
