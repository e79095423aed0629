"""Checks of names: would every tensor reach a module, and the right one?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

from ..model.match import Classes
from ..model.names import PEFT_PREFIX as PREFIX
from ..model.names import as_transformers_reads, unwrapped
from ..model.tasks import POOLING, architecture_of, auto_class
from ..model.tying import groups
from ..targets.engines import VLLM_TEXT_NAMES, Profile
from ..targets.lora_folder import CONFIG
from .finding import AGAIN, MERGE, PEFTS_OWN, Adapter, Finding

_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.(?:(.+)\.)?([^.]+)")
_PARTING = (*PEFTS_OWN, "vllm")  # which compute with a tied side as if it were alone
_REWRITE = "`lint` with `fix` writes the names PEFT knows"


def prefix(adapter: Adapter) -> Iterator[Finding]:
    for factor in adapter.factors:
        known = factor.module in adapter.loaded or (
            ".experts" in factor.module and adapter.prefixed
        )
        if not factor.key.startswith(PREFIX) and not known:
            for severity, targets in adapter.graded(lambda engine: engine.prefix):
                yield Finding(
                    "prefix", severity, targets, factor.key,
                    "the name lacks PEFT's prefix, so the tensor may be left out unsaid",
                    "no prefix", f"{PREFIX}…", _REWRITE,
                )  # fmt: skip
        elif factor.named:
            # PEFT calls the adapter it loads "default".
            wrong = _not_peft if factor.named == "default" else _anyone
            for severity, targets in adapter.graded(wrong):
                yield Finding(
                    "adapter-name", severity, targets, factor.key,
                    "the name of the adapter is part of the tensor's name", factor.named,
                    f"…lora_{factor.letter}.weight", _REWRITE,
                )  # fmt: skip


def _not_peft(engine: Profile) -> bool:
    return engine.name != "peft"


def _anyone(_engine: Profile) -> bool:
    return True


def duplicates(adapter: Adapter) -> Iterator[Finding]:
    counts = Counter((factor.module, factor.letter) for factor in adapter.factors)
    for (module, letter), count in counts.items():
        if count > 1:
            yield Finding(
                "duplicate", "error", adapter.all, f"{module}.lora_{letter}",
                "two tensors are the same factor", f"{count} tensors", "one",
                "remove the wrong one, or save the adapter again",
            )  # fmt: skip


def incomplete(adapter: Adapter) -> Iterator[Finding]:
    letters: dict[str, set[str]] = {}
    for factor in adapter.factors:
        letters.setdefault(factor.module, set()).add(factor.letter)
    for module, present in letters.items():
        for letter in sorted({"A", "B"} - present):
            yield Finding(
                "incomplete", "error", adapter.all, f"{module}.lora_{letter}",
                "one factor of the pair is missing", f"only lora_{next(iter(present))}",
                "lora_A and lora_B", AGAIN,
            )  # fmt: skip


def unknown_modules(adapter: Adapter) -> Iterator[Finding]:
    """Experts are left out: their names in memory differ from those on disk."""
    for module in adapter.layers:
        if ".experts" in module:
            continue
        meant = adapter.meant(module)
        if meant is None:
            yield Finding(
                "no-such-module", "error", adapter.all, module,
                "the base has no such module: this part of the adapter would do nothing", module,
                f"a module of {adapter.base.name if adapter.base else 'the base'}",
                "use the base it was trained on, or rename the module",
            )  # fmt: skip
            continue
        if module in adapter.pairs and adapter.is_embedding(meant):
            yield Finding(
                "embedding", "error", adapter.all, module,
                "an embedding with the factors of a linear layer: PEFT leaves this part out",
                f"{module}.lora_A.weight", f"{module}.lora_embedding_A", AGAIN,
            )  # fmt: skip
            continue
        deaf = adapter.where(partial(_misses, adapter, module, meant))
        if deaf:
            yield Finding(
                "other-name", "error", deaf, module,
                "the engine has no module of this name: this part of the adapter would do nothing",
                module, meant, _REWRITE,
            )  # fmt: skip


def _misses(adapter: Adapter, module: str, meant: str, engine: Profile) -> bool:
    return not _finds(adapter, engine, module, meant)


def _finds(adapter: Adapter, engine: Profile, module: str, meant: str) -> bool:
    """Whether `engine` takes the stored `module` for `meant`."""
    known = adapter.classes
    if engine.name == "peft":
        return module in adapter.loaded
    if engine.name == "transformers":
        return _loads(known, module)
    if engine.name != "vllm":
        return module == meant
    # Everywhere, but only of a name that begins with it.
    plain = module.replace(PREFIX, "") if module.startswith(PREFIX) else module
    forms = {meant}
    if known is not None and known.base.config.get("text_config") is not None:
        own = meant.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        forms.add(own)
        if known.base.config.get("model_type") in VLLM_TEXT_NAMES:
            forms.add(meant.replace("model.language_model.", "model.", 1))
    if adapter.task in POOLING:
        forms |= {meant.removeprefix("model."), f"model.{meant}"}
    return plain in forms


def _loads(known: Classes | None, module: str) -> bool:
    """Whether transformers' own loader finds it, which reads the names of an adapter as those of a
    checkpoint."""
    plain = as_transformers_reads(PREFIX + module)
    if known is None:
        return plain == unwrapped(plain)
    return any(layout.names.loads(plain) for layout in known.layouts)


def text_model(adapter: Adapter) -> Iterator[Finding]:
    """Names of the text model alone, which `AutoModelFor…` does not make of every base."""
    known, targets = adapter.classes, adapter.where(lambda engine: engine.name in PEFTS_OWN)
    if known is None or known.text is None or not targets:
        return
    names = known.text.names
    for module in adapter.loaded:
        if names.has(adapter.loaded[module]) and not known.whole.names.has(adapter.loaded[module]):
            auto = auto_class(known.base.config, adapter.task)
            yield Finding(
                "text-model", "info" if auto == names.architecture else "warning", targets, module,
                f"the adapter is for the text model alone: right in {names.architecture} only",
                f"{names.architecture}, where AutoModel makes a {auto}",
                f"the base loaded as {names.architecture}",
                "load it in that class, or serve it with vLLM (`adapter` with `target` vllm)",
            )  # fmt: skip
            return


def targeted(adapter: Adapter) -> Iterator[Finding]:
    targets = adapter.config.get("target_modules")
    if not targets:
        if not adapter.config.get("target_parameters"):
            yield Finding(
                "no-targets", "error", adapter.all, f"{CONFIG}: target_modules",
                "no module is named, so PEFT adapts none", str(targets),
                ", ".join(sorted({module.split(".")[-1] for module in adapter.pairs})),
                "`lint` with `fix` names the modules that are stored",
            )  # fmt: skip
        return
    sides = _tied_to_targets(adapter) if adapter.config.get("ensure_weight_tying") else ()
    for module in adapter.layers:
        own = adapter.loaded.get(module) or adapter.meant(module) or module
        if ".experts" not in module and own not in sides and not _matches(adapter, own):
            yield Finding(
                "not-targeted", "error", adapter.all, module,
                "the module is stored but not among target_modules, so PEFT leaves it out",
                str(targets)[:80], module, "`lint` with `fix` names the modules that are stored",
            )  # fmt: skip


def _tied_to_targets(adapter: Adapter) -> set[str]:
    """The modules that PEFT adapts too because they are tied to one that is named."""
    base = adapter.base
    found = [] if base is None else groups(base, architecture_of(base.config) or None, None)
    sides = [[name.removesuffix(".weight") for name in group] for group in found]
    named = [group for group in sides if any(_matches(adapter, side) for side in group)]
    return {side for group in named for side in group}


def _matches(adapter: Adapter, module: str) -> bool:
    """PEFT's rule, `peft.tuners.tuners_utils.check_target_module_exists`."""
    config = adapter.config
    targets, saved = config["target_modules"], config.get("modules_to_save")
    if _names(adapter, config.get("exclude_modules"), module):
        return False
    if any(f".{name}." in f".{module}." for name in (saved if isinstance(saved, list) else ())):
        return False
    if str(targets).lower() == "all-linear":
        return module != _head(adapter)
    if not _names(adapter, targets, module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    if module in (targets if isinstance(targets, list) else ()):
        return True
    said = config.get("layers_pattern")
    stems = said if isinstance(said, list) else [said] if said else [r"[^.]*"]
    within = [int(match[2]) for match in [_LAYER.fullmatch(module)] if match]
    named = layers if isinstance(layers, list) else [layers]
    return any(
        number in named and adapter.patterns.whole(rf"(.*\.)?{stem}\.{number}\..*", module)
        for number in within
        for stem in stems
    )


def _names(adapter: Adapter, said: object, module: str) -> bool:
    """Whether a regular expression or a list of last parts of names means `module`."""
    if isinstance(said, str):
        return adapter.patterns.whole(said, module)
    names = said if isinstance(said, list) else []
    return any(module == name or module.endswith(f".{name}") for name in names)


def _head(adapter: Adapter) -> str:
    """The output embedding, which PEFT takes for no linear layer like the others."""
    if adapter.classes is None:
        return "lm_head"
    model = adapter.classes.whole.names.model
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def kinds(adapter: Adapter) -> Iterator[Finding]:
    config = {} if adapter.base is None else adapter.base.config
    family = config.get("model_type")
    for engine in adapter.engines:
        for module in (*adapter.pairs, *adapter.embeddings):
            if not engine.adapts(module, family, architecture_of(config)):
                yield Finding(
                    "family", "error", (engine.name,), module,
                    f"{engine.name} does not adapt this module of such a model", str(family),
                    "another engine", MERGE,
                )  # fmt: skip
            if engine.kinds is not None and module.split(".")[-1] not in engine.kinds:
                yield Finding(
                    "kind", "error", (engine.name,), module,
                    f"{engine.name} adapts no modules of this kind", module.split(".")[-1],
                    ", ".join(sorted(engine.kinds)), MERGE,
                )  # fmt: skip


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
                    "layers", "error" if engine.drops else "warning", (engine.name,),
                    ".".join(filter(None, (head, str(absent[0]), stem, kind))),
                    "the engine leaves this kind out of all layers when one lacks it"
                    if engine.drops
                    else "some versions keep another adapter's weights where a layer lacks its own",
                    f"{kind} in {len(present)} layers",
                    f"in layer {', '.join(map(str, absent[:8]))} too", fix,
                )  # fmt: skip
            for group in engine.together:
                lacking = [k for k in group if kind in group and (head, stem, k) not in stems]
                if lacking and kind == next(k for k in group if (head, stem, k) in stems):
                    yield Finding(
                        "stacked", "warning", (engine.name,),
                        ".".join(filter(None, (head, "*", stem, lacking[0]))),
                        "the engine stacks these modules, and some versions need all of them",
                        ", ".join(k for k in group if k not in lacking), ", ".join(group), fix,
                    )  # fmt: skip


def _layers(adapter: Adapter, head: str, stem: str, kind: str) -> set[int]:
    if adapter.base is None:
        found = (_LAYER.fullmatch(module) for module in adapter.pairs)
        return {int(match[2]) for match in found if match and match[1] == head}
    numbers = {int(m[2]) for name in adapter.base.tensors if (m := _LAYER.fullmatch(name))}
    names = {n: ".".join(filter(None, (head, str(n), stem, kind))) for n in numbers}
    return {n for n, name in names.items() if adapter.meant(name) is not None}


def tied(adapter: Adapter) -> Iterator[Finding]:
    base = adapter.base
    modules = (*adapter.pairs, *adapter.embeddings)
    if base is None or all(_LAYER.fullmatch(module) for module in modules):
        return
    for group in groups(base, architecture_of(base.config) or None, None):
        for module in modules:
            if not any(f".{name}".endswith(f".{module}.weight") for name in group):
                continue
            for severity, targets in adapter.graded(lambda engine: engine.name not in _PARTING):
                yield Finding(
                    "tied", severity, targets, module,
                    "embedding and head are one tensor in the base, and one side of it is adapted",
                    f"an adapter on {module}", "none on tied tensors",
                    "merge it (`merge`), which unties the pair",
                )  # fmt: skip


CHECKS = (prefix, duplicates, incomplete, unknown_modules, text_model, targeted, kinds, gaps, tied)
