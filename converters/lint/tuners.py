"""Checks of the adapters of PEFT's other tuners, whose tensors only PEFT knows."""

from __future__ import annotations

from collections.abc import Iterator

from ..model.names import PEFT_PREFIX as PREFIX
from ..model.names import Names, unwrapped
from ..targets.lora_folder import CONFIG
from .finding import MERGE, PEFTS_OWN, Adapter, Finding

_SHARED = "base_model."  # of what layers share: PEFT's prefix without the model


def names(adapter: Adapter) -> Iterator[Finding]:
    known = adapter.classes
    engines = adapter.where(lambda engine: engine.name in PEFTS_OWN)
    if adapter.is_lora or known is None:
        return
    layouts = [layout for layout in (known.whole, known.text) if layout is not None]
    for key in adapter.tensors:
        finds = {
            "peft": key.startswith(PREFIX)
            and any(_has(layout.names, key.removeprefix(PREFIX)) for layout in layouts),
            "transformers": ".default" not in key
            and any(_loads(layout.names, key.replace(PREFIX, "")) for layout in layouts),
        }
        meant = [layout.names.inside(unwrapped(key)) for layout in layouts]
        found = next((name for name in meant if name is not None), None)
        shared = found is None and key.startswith(_SHARED) and key == unwrapped(key)
        deaf = tuple(name for name in engines if not finds[name] and not shared)
        if deaf:
            yield Finding(
                "other-name", "error", deaf, key,
                "the engine has no module of this name: this part of the adapter would do nothing",
                key, f"{PREFIX}{found}" if found else "a module of the base",
                MERGE if found else "use the base it was trained on, or rename the module",
            )  # fmt: skip


def _has(own: Names, key: str) -> bool:
    """Whether the class has a module of that very name, of which `key` is a tensor."""
    return any(own.has(key[:end]) for end, char in enumerate(key) if char == ".")


def _loads(own: Names, key: str) -> bool:
    """Whether transformers' loader finds that module."""
    modules = (key[:end] for end, char in enumerate(key) if char == ".")
    return any(own.loads(module) for module in modules)


def shared_state(adapter: Adapter) -> Iterator[Finding]:
    """Tuners that `load_adapter` of transformers does not take."""
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        return
    kind = str(adapter.config.get("peft_type"))
    targets = adapter.where(lambda engine: engine.name == "transformers")
    if targets and getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "uses_shared_state", False):
        yield Finding(
            "peft-type", "error", targets, f"{CONFIG}: peft_type",
            "the layers of this tuner share tensors, which only PEFT's own model holds", kind,
            "a tuner whose layers stand alone", MERGE,
        )  # fmt: skip


CHECKS = (names, shared_state)
