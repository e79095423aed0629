"""Checks of what training added to plain LoRA, and whether an engine knows it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import DoraExportError
from ..files.tensors import same_values
from ..model.base import CONV1D_LAYERS
from ..model.layout import FUSED
from ..readers import ReadOptions, read_run
from ..readers.peft_common import (
    ATTENTION_OUT,
    IN_PEFT,
    OTHER,
    PLAIN,
    is_below,
    modules_to_save,
)
from ..readers.peft_initial import BASE_CHANGING
from ..readers.promises import LostError
from ..readers.unsloth import LAYOUT, began_otherwise, laid_by_expert
from ..targets.lora_folder import CONFIG
from .finding import MERGE, PEFTS_OWN, REPACK, Adapter, Finding

# Field of the configuration → tensors it brings along.
_FEATURES = {
    "use_dora": r"lora_magnitude_vector",
    "lora_bias": r"\.lora_B\.bias$",
    "trainable_token_indices": r"trainable_tokens_",
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_mora": None,
    "use_qalora": None,
    "use_bdlora": None,
    "arrow_config": None,
    "velora_config": r"\.lora_velora_",
    "monteclora_config": r"\.lora_monteclora_sampler\.",
    "kasa_config": r"\.lora_diag$",
}
_AS_PLAIN = "write it as plain LoRA (`adapter`)"
# Initialisations that PEFT calculates from the base alone, so that loading repeats them.
_AGAIN = ("pissa", "olora")
_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.([^.]+)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in a base's configuration


def kind(adapter: Adapter) -> Iterator[Finding]:
    name = adapter.config.get("peft_type")
    if not adapter.is_lora:
        stored = bool(adapter.factors)  # of LoRA, which another tuner of PEFT does not read
        targets = adapter.where(lambda engine: stored or engine.name not in PEFTS_OWN)
        if targets:
            yield Finding(
                "peft-type", "error", targets, f"{CONFIG}: peft_type", "this is no LoRA adapter",
                str(name), "LORA", "`adapter` repacks it, or `merge`",
            )  # fmt: skip


def features(adapter: Adapter) -> Iterator[Finding]:
    for key, pattern in _FEATURES.items() if adapter.is_lora else ():
        tensors = [name for name in adapter.others if pattern and re.search(pattern, name)]
        said = bool(adapter.config.get(key))
        targets = tuple(
            e.name
            for e in adapter.engines
            if key not in e.features
            and not (key == "target_parameters" and _family(adapter) in e.fused and _both(adapter))
        )
        if said and targets:
            yield Finding(
                key, "error", targets, tensors[0] if tensors else f"{CONFIG}: {key}",
                f"the engine does not know {key}", str(adapter.config[key])[:80], "plain LoRA",
                _AS_PLAIN if key in PLAIN else IN_PEFT if key in OTHER else MERGE,
            )  # fmt: skip
        if tensors and not said:
            yield Finding(
                key, "error", adapter.all, tensors[0],
                f"the tensors of {key} are there, but the configuration does not say so",
                f"{len(tensors)} tensors, {key}: {adapter.config.get(key)}", f"{key} set",
                f"set {key} as training had it",
            )  # fmt: skip


def _family(adapter: Adapter) -> str:
    return "" if adapter.base is None else str(adapter.base.config.get("model_type"))


def _both(adapter: Adapter) -> bool:
    """Whether both parameters of fused experts are adapted."""
    said = adapter.config.get("target_parameters")
    return isinstance(said, list) and {str(n).rpartition(".")[2] for n in said} == {*FUSED}


def whole_tensors(adapter: Adapter) -> Iterator[Finding]:
    features = "|".join(pattern for pattern in _FEATURES.values() if pattern)
    whole = [name for name in adapter.others if not re.search(features, name)]
    biases = [name for name in whole if name.endswith(".bias") and not _saved(adapter, name)]
    adapted = {*adapter.pairs, *adapter.embeddings}
    for name in whole:
        module = re.sub(r"(\.base_layer)?\.[^.]+$", "", name)
        if name in biases or (module in adapted and name.endswith("weight")):
            continue  # an adapter on an embedding or head may carry its untouched weight along
        last = module.split(".")[-1] if not _saved(adapter, name) else _saved(adapter, name)
        targets = tuple(
            engine.name
            for engine in adapter.engines
            if engine.whole_modules is not None and last not in engine.whole_modules
        )
        if targets:
            same = _is_bases(adapter, name)
            yield Finding(
                "modules_to_save", "error", targets, name,
                "the engine loads no tensor that was trained whole",
                "the values of the base" if same else "values of its own",
                "only lora_A and lora_B", REPACK if same else MERGE,
            )  # fmt: skip
    targets = adapter.where(lambda engine: not engine.biases)
    if targets and (biases or adapter.config.get("bias", "none") != "none"):
        yield Finding(
            "bias", "error", targets, biases[0] if biases else f"{CONFIG}: bias",
            "the engine loads no trained biases", f"bias: {adapter.config.get('bias')}",
            "bias: none", MERGE,
        )  # fmt: skip


def _is_bases(adapter: Adapter, name: str) -> bool:
    """Whether a tensor that was kept whole is still the base's, and so is left out."""
    known = None if adapter.base is None else adapter.base.weight(name.removesuffix(".weight"))
    tensor = adapter.tensors[adapter.others[name]]
    return known is not None and known.shape == tensor.shape and same_values(tensor, known)


def _saved(adapter: Adapter, name: str) -> str:
    """The entry of modules_to_save that `name` belongs to, empty for none."""
    saved = modules_to_save(adapter.config)
    return next((entry for entry in saved if is_below(name, entry)), "")


def quantized(adapter: Adapter) -> Iterator[Finding]:
    """Of a layer that was trained whole PEFT puts a copy beside the base's own. That of a quantized
    one has packed numbers, and loading it is an error."""
    targets, base = adapter.where(lambda engine: engine.name in PEFTS_OWN), adapter.base
    if not targets or base is None:
        return
    for name in adapter.others:
        if _saved(adapter, name) and base.is_quantized(name):
            yield Finding(
                "quantized", "error", targets, name,
                "PEFT loads no weight of its own for a layer that the base quantizes",
                "a layer that was trained whole", "one that the base holds as floats",
                f"load it beside the dequantized base, or {MERGE}",
            )  # fmt: skip


def embeddings(adapter: Adapter) -> Iterator[Finding]:
    family = None if adapter.base is None else adapter.base.config.get("model_type")
    targets = adapter.where(lambda engine: not engine.embeds(family))
    for module in adapter.embeddings if targets else ():
        yield Finding(
            "embedding", "error", targets, module, "the engine loads no adapters on embeddings",
            f"{module}.lora_embedding_A", "adapters on linear layers", MERGE,
        )  # fmt: skip


def attention(adapter: Adapter) -> Iterator[Finding]:
    targets = adapter.where(lambda engine: engine.name not in PEFTS_OWN)
    for module in adapter.pairs if targets else ():
        if module.endswith(ATTENTION_OUT):
            yield Finding(
                "attention", "error", targets, module.removesuffix(ATTENTION_OUT),
                "the engine loads no adapters on torch's MultiheadAttention", module,
                "adapters on linear layers", MERGE,
            )  # fmt: skip


def experts(adapter: Adapter) -> Iterator[Finding]:
    """Single experts, as transformers 4 named them, where an engine packs those of a layer."""
    targets = adapter.where(lambda engine: bool(engine.experts))
    layers: dict[str, set[tuple[int, str]]] = {}
    for match in filter(None, map(_EXPERT.fullmatch, adapter.pairs if targets else ())):
        layers.setdefault(match[1], set()).add((int(match[2]), match[3]))
    for engine in (engine for engine in adapter.engines if engine.name in targets):
        called = engine.experts_in.get(_family(adapter), "experts")
        for layer, present in layers.items():
            if not layer.endswith(f".{called}"):
                yield Finding(
                    "experts", "error", (engine.name,), layer,
                    "the engine's class has them under another name, and leaves these out",
                    layer, f"….{called}", MERGE,
                )  # fmt: skip
                continue
            kinds = {kind for _, kind in present}
            needed = next((each for each in engine.experts if kinds & each), kinds)
            every = {(n, kind) for n in range(_count(adapter, present)) for kind in needed}
            absent = sorted(every - present)
            yield Finding(
                "experts", "error" if absent else "warning", (engine.name,), layer,
                "the engine packs the experts of a layer, and stops where one lacks an adapter"
                if absent
                else "the engine's kernels for adapters on experts run on a GPU alone",
                f"{len(present)} adapters", f"{len(every)} adapters", MERGE,
            )  # fmt: skip


def _count(adapter: Adapter, present: set[tuple[int, str]]) -> int:
    config = {} if adapter.base is None else adapter.base.config
    text = config.get("text_config")
    places = [place for place in (config, text) if isinstance(place, dict)]
    said = [place[key] for place in places for key in _EXPERTS if isinstance(place.get(key), int)]
    return said[0] if said else 1 + max(number for number, _ in present)


def initialisation(adapter: Adapter) -> Iterator[Finding]:
    name = str(adapter.config.get("init_lora_weights")).lower()
    if not name.startswith(BASE_CHANGING):
        return
    again = name in _AGAIN and not began_otherwise(adapter.path)
    for severity, targets in adapter.graded(
        lambda engine: engine.name not in PEFTS_OWN or not again
    ):
        yield Finding(
            "init", severity, targets, f"{CONFIG}: init_lora_weights",
            "this initialisation changed the base weights: the adapter is right on those only"
            if severity == "error"
            else "PEFT changes the base weights again, as in training, and from float32 only",
            name, "an adapter to the original base",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip


def packing(adapter: Adapter) -> Iterator[Finding]:
    """Experts as unsloth of before 2026.9.6 trained them, whose configuration may not say so."""
    if adapter.is_lora and laid_by_expert(adapter.config):
        yield Finding(
            LAYOUT, "error" if adapter.config.get(LAYOUT) else "warning", adapter.all,
            f"{CONFIG}: {LAYOUT}", "PEFT and all engines take lora_B of experts for another one "
            "than unsloth trained", str(adapter.config.get(LAYOUT)), "rank_major",
            "write it anew (`adapter` with `base`), which lays it as PEFT reads it",
        )  # fmt: skip


def orientation(adapter: Adapter) -> Iterator[Finding]:
    said = bool(adapter.config.get("fan_in_fan_out"))
    targets = adapter.where(lambda engine: not engine.conv1d)
    wrong = []
    for module in adapter.pairs:
        conv1d = module.split(".")[-1] in CONV1D_LAYERS
        if adapter.base is not None:
            conv1d = adapter.base.is_conv1d(module)
        elif conv1d:
            continue  # Starcoder 2 has linear layers of these names
        if conv1d and targets:
            yield Finding(
                "conv1d", "error", targets, module,
                "llama.cpp's converter transposes the update of a Conv1D layer", "a Conv1D layer",
                "linear layers", f"`lint` with `target` {targets[0]} and `fix`",
            )  # fmt: skip
        if said != conv1d:
            wrong.append(module)
    if wrong:
        yield Finding(
            "fan_in_fan_out", "warning", adapter.all, wrong[0],
            "fan_in_fan_out does not fit the layer; a tool that trusts it transposes wrongly",
            str(said).lower(), str(not said).lower(),
            "`lint` with `base` and `fix` sets it by the layers of the base",
        )  # fmt: skip


def promises(adapter: Adapter) -> Iterator[Finding]:
    """What the configuration says was trained and the file lacks: PEFT refuses some of it, and
    every engine computes without it."""
    try:
        base = None if adapter.base is None else adapter.base.path
        read_run(adapter.path, ReadOptions(base=base))
    except LostError as lost:
        yield Finding(
            "promise", "error", adapter.all, str(lost.tensor), lost.message,
            str(lost.found), str(lost.expected), str(lost.remedy),
        )  # fmt: skip
    except DoraExportError:
        return  # told by the checks of what is there


CHECKS = (
    kind,
    features,
    whole_tensors,
    quantized,
    embeddings,
    attention,
    experts,
    initialisation,
    packing,
    orientation,
    promises,
)
