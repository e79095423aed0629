"""Torch and transformers without what they bring along and is not used here, since others are
served meanwhile: it would be half of the memory, and of the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_UNUSED = ("boto3", "scipy", "sklearn")  # 65 MB
_COMPILER = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")  # 70 MB


@contextmanager
def without_unused() -> Iterator[None]:
    """Let transformers be imported without packages of which it makes nothing here."""
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in _UNUSED if name not in modules]
    modules.update(dict.fromkeys(hidden))  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:  # PEFT may need one
            del modules[name]


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let transformers be imported, and tensors computed, without torch's compiler and what tells
    processes of each other. Its models do not run in this process, then or later: their masks want
    the compiler."""
    import torch.distributed

    plain = {name: _Plain(name) for name in _COMPILER if name not in sys.modules}
    sys.modules.update(plain)
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
        for name in plain:
            del sys.modules[name]


class _Plain(ModuleType):
    """A module all of whose decorators leave a function as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return _unchanged if function is None else function
