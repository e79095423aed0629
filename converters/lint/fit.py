"""Checks against the base model: is it the one the adapter was trained on?"""

from __future__ import annotations

from collections.abc import Iterator

from ..certificate import FILE, fingerprint_of_base
from ..files.tensors import read_json
from .finding import Adapter, Finding

_OTHER = "pass the base the adapter was trained on"


def shapes(adapter: Adapter) -> Iterator[Finding]:
    for module, (a, b) in adapter.pairs.items():
        stored = _shape(adapter, module)
        if stored is None or ".experts" in module:
            continue
        found = (b.shape[0], *a.shape[1:])
        wider = (b.shape[0], *(n * adapter.blocks for n in a.shape[1:]))
        if not {found, wider} & {stored, stored[::-1]}:
            yield Finding(
                "shape", "error", adapter.all, module,
                "the update does not fit the base weight", str(list(found)), str(list(stored)),
                _OTHER,
            )  # fmt: skip


def _shape(adapter: Adapter, module: str) -> tuple[int, ...] | None:
    """The shape of a weight in memory: on disk a quantized one has another."""
    if adapter.base is None:
        return None
    if adapter.classes is not None:
        state, name = adapter.classes.whole.names.state, adapter.meant(module)
        return state.get(f"{name}.weight") or state.get(str(name))
    weight = adapter.base.weight(module)
    return None if weight is None or adapter.base.packed else weight.shape


def fingerprints(adapter: Adapter) -> Iterator[Finding]:
    """By the certificate beside the adapter, where dora-export wrote one."""
    path = adapter.path / FILE
    if adapter.base is None or not path.is_file():
        return
    known = fingerprint_of_base(read_json(path))
    if known is not None and (other := adapter.base.unlike(known)):
        yield Finding(
            "fingerprint", "error", adapter.all, other[0],
            "this is not the base the adapter was made for: "
            f"{len(other)} of its tensors are others than {FILE} says",
            f"{adapter.base.name}", str(known.get(other[0]))[:12], _OTHER,
        )  # fmt: skip


CHECKS = (shapes, fingerprints)
