"""Checks of names: would every tensor reach a module, and the right one?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ..model.tasks import architecture_of
from ..model.tying import groups
from ..targets.engines import Profile
from ..targets.lora_folder import CONFIG
from .finding import PEFTS_OWN, PREFIX, Adapter, Finding

_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.(?:(.+)\.)?([^.]+)")
_REWRITE = "`lint` with `fix` writes the names PEFT knows"


def prefix(adapter: Adapter) -> Iterator[Finding]:
    for factor in adapter.factors:
        if not factor.key.startswith(PREFIX):
            for severity, targets in adapter.graded(lambda engine: engine.prefix):
                yield Finding(
                    "prefix",
                    severity,
                    targets,
                    factor.key,
                    "the name lacks PEFT's prefix, so the tensor may be left out unsaid",
                    "no prefix",
                    f"{PREFIX}…",
                    _REWRITE,
                )
        elif factor.named:
            # PEFT calls the adapter it loads "default".
            wrong = _not_peft if factor.named == "default" else _anyone
            for severity, targets in adapter.graded(wrong):
                yield Finding(
                    "adapter-name",
                    severity,
                    targets,
                    factor.key,
                    "the name of the adapter is part of the tensor's name",
                    factor.named,
                    f"…lora_{factor.letter}.weight",
                    _REWRITE,
                )


def _not_peft(engine: Profile) -> bool:
    return engine.name != "peft"


def _anyone(_engine: Profile) -> bool:
    return True


def duplicates(adapter: Adapter) -> Iterator[Finding]:
    counts = Counter((factor.module, factor.letter) for factor in adapter.factors)
    for (module, letter), count in counts.items():
        if count > 1:
            yield Finding(
                "duplicate",
                "error",
                adapter.all,
                f"{module}.lora_{letter}",
                "two tensors are the same factor",
                f"{count} tensors",
                "one",
                "remove the wrong one, or save the adapter again",
            )


def incomplete(adapter: Adapter) -> Iterator[Finding]:
    letters: dict[str, set[str]] = {}
    for factor in adapter.factors:
        letters.setdefault(factor.module, set()).add(factor.letter)
    for module, present in letters.items():
        for letter in sorted({"A", "B"} - present):
            yield Finding(
                "incomplete",
                "error",
                adapter.all,
                f"{module}.lora_{letter}",
                "one factor of the pair is missing",
                f"only lora_{next(iter(present))}",
                "lora_A and lora_B",
                "save the adapter again from the training run",
            )


def unknown_modules(adapter: Adapter) -> Iterator[Finding]:
    """Experts are left out: their names in memory differ from those on disk."""
    if adapter.base is None:
        return
    for module in (*adapter.pairs, *adapter.embeddings):
        if ".experts" not in module and adapter.base.weight(module) is None:
            yield Finding(
                "no-such-module",
                "error",
                adapter.all,
                module,
                "the base has no such module: this part of the adapter would do nothing",
                module,
                f"a module of {adapter.base.name}",
                "use the base it was trained on, or rename the module",
            )


def targeted(adapter: Adapter) -> Iterator[Finding]:
    targets = adapter.config.get("target_modules")
    if not targets:
        if not adapter.config.get("target_parameters"):
            yield Finding(
                "no-targets",
                "error",
                adapter.all,
                f"{CONFIG}: target_modules",
                "no module is named, so PEFT adapts none",
                str(targets),
                ", ".join(sorted({module.split(".")[-1] for module in adapter.pairs})),
                "`lint` with `fix` names the modules that are stored",
            )
        return
    for module in (*adapter.pairs, *adapter.embeddings):
        if ".experts" not in module and not _matches(adapter, module):
            yield Finding(
                "not-targeted",
                "error",
                adapter.all,
                module,
                "the module is stored but not among target_modules, so PEFT leaves it out",
                str(targets)[:80],
                module,
                "`lint` with `fix` names the modules that are stored",
            )


def _matches(adapter: Adapter, module: str) -> bool:
    """PEFT's rule, `peft.tuners.tuners_utils.check_target_module_exists`."""
    config = adapter.config
    targets = config["target_modules"]
    if isinstance(targets, str):
        return targets == "all-linear" or adapter.patterns.whole(targets, module)
    names = targets if isinstance(targets, list) else []
    if not any(module == name or module.endswith(f".{name}") for name in names):
        return False
    layers = config.get("layers_to_transform")
    if layers is None:
        return True
    match = _LAYER.fullmatch(module)
    named = layers if isinstance(layers, list) else [layers]
    return match is not None and int(match[2]) in named


def kinds(adapter: Adapter) -> Iterator[Finding]:
    family = None if adapter.base is None else adapter.base.config.get("model_type")
    for engine in adapter.engines:
        for module in adapter.pairs:
            if not engine.adapts(module, family):
                yield Finding(
                    "family",
                    "error",
                    (engine.name,),
                    module,
                    f"{engine.name} does not adapt this module of such a model",
                    str(family),
                    "another engine",
                    "deploy the merged model (`merge`)",
                )
            if engine.kinds is not None and module.split(".")[-1] not in engine.kinds:
                yield Finding(
                    "kind",
                    "error",
                    (engine.name,),
                    module,
                    f"{engine.name} adapts no modules of this kind",
                    module.split(".")[-1],
                    ", ".join(sorted(engine.kinds)),
                    "deploy the merged model (`merge`)",
                )


def gaps(adapter: Adapter) -> Iterator[Finding]:
    """Kinds that are not in every layer, or without those they are stacked with."""
    stems: dict[tuple[str, str, str], set[int]] = {}
    for module in adapter.pairs:
        if match := _LAYER.fullmatch(module):
            stems.setdefault((match[1], match[3] or "", match[4]), set()).add(int(match[2]))
    for engine in (engine for engine in adapter.engines if engine.uniform):
        fix = f"`lint` with `target` {engine.name} and `fix` stores zeros there"
        for (head, stem, kind), present in stems.items():
            absent = sorted(_layers(adapter, head, stem, kind) - present)
            if absent:
                yield Finding(
                    "layers",
                    "error" if engine.drops else "warning",
                    (engine.name,),
                    ".".join(filter(None, (head, str(absent[0]), stem, kind))),
                    "the engine leaves this kind out of all layers when one lacks it"
                    if engine.drops
                    else "some versions keep another adapter's weights where a layer lacks its own",
                    f"{kind} in {len(present)} layers",
                    f"in layer {', '.join(map(str, absent[:8]))} too",
                    fix,
                )
            for group in engine.together:
                lacking = [k for k in group if kind in group and (head, stem, k) not in stems]
                if lacking and kind == next(k for k in group if (head, stem, k) in stems):
                    yield Finding(
                        "stacked",
                        "warning",
                        (engine.name,),
                        ".".join(filter(None, (head, "*", stem, lacking[0]))),
                        "the engine stacks these modules, and some versions need all of them",
                        ", ".join(k for k in group if k not in lacking),
                        ", ".join(group),
                        fix,
                    )


def _layers(adapter: Adapter, head: str, stem: str, kind: str) -> set[int]:
    if adapter.base is None:
        found = (_LAYER.fullmatch(module) for module in adapter.pairs)
        return {int(match[2]) for match in found if match and match[1] == head}
    numbers = {int(m[2]) for name in adapter.base.tensors if (m := _LAYER.fullmatch(name))}
    names = {n: ".".join(filter(None, (head, str(n), stem, kind))) for n in numbers}
    return {n for n, name in names.items() if adapter.base.weight(name) is not None}


def tied(adapter: Adapter) -> Iterator[Finding]:
    base = adapter.base
    modules = (*adapter.pairs, *adapter.embeddings)
    if base is None or all(_LAYER.fullmatch(module) for module in modules):
        return
    for group in groups(base, architecture_of(base.config) or None, None):
        for module in modules:
            if not any(f".{name}".endswith(f".{module}.weight") for name in group):
                continue
            for severity, targets in adapter.graded(lambda engine: engine.name not in PEFTS_OWN):
                yield Finding(
                    "tied",
                    severity,
                    targets,
                    module,
                    "embedding and head are one tensor in the base, and one side of it is adapted",
                    f"an adapter on {module}",
                    "none on tied tensors",
                    "merge it (`merge`), which unties the pair",
                )


CHECKS = (prefix, duplicates, incomplete, unknown_modules, targeted, kinds, gaps, tied)
