"""PEFT itself asked: does it take the adapter as it lies there? On a model without weights."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..model.names import PEFT_PREFIX, Names, as_transformers_reads
from ..readers.peft_common import ATTENTION_OUT, of_training_alone
from ..targets.lora_folder import CONFIG
from .finding import AGAIN, PEFTS_OWN, Adapter, Finding

# What PEFT would import a module for, or read other files and weights for.
_LEFT_OUT = frozenset(
    "auto_mapping megatron_config megatron_core loftq_config eva_config corda_config "
    "lora_ga_config runtime_config".split()
)
_MOST_LAYERS = 2_000
_ADAPTED = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))(\.weight)?$")


@dataclass(frozen=True)
class _Outcome:
    """`error`: why PEFT refuses it; `both`: and transformers too. `unknown`: the tensors it has no
    place for; `lost`: those that transformers' loader has none for. `fresh`: those PEFT makes up
    because the file lacks them."""

    error: str = ""
    both: bool = True
    unknown: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def wrong(self) -> int:
        return (1 << 30 if self.error else 0) + len(self.unknown) + len(self.fresh)


def loading(adapter: Adapter) -> Iterator[Finding]:
    """What the other checks did not foresee, where peft is installed."""
    targets = adapter.where(lambda engine: engine.name in PEFTS_OWN)
    known = adapter.classes
    if not targets or known is None or not adapter.is_lora or find_spec("peft") is None:
        return
    outcomes = [_load(adapter, layout.names) for layout in known.layouts]
    outcome = min(outcomes, key=lambda each: each.wrong)
    lost = min((each.lost for each in outcomes if not each.error), key=len, default=())
    refusing = targets if outcome.both else tuple(name for name in targets if name == "peft")
    if outcome.error and refusing:
        yield Finding(
            "refused", "error", refusing, CONFIG, "PEFT does not load this adapter",
            outcome.error, "one that it loads", AGAIN,
        )  # fmt: skip
    for engine, names in (("peft", outcome.unknown), ("transformers", lost)):
        for name in names if engine in targets else ():
            yield Finding(
                "ignored", "error", (engine,), name,
                f"{engine} has no place for this tensor of an adapter",
                name, "what the configuration makes of the base", AGAIN,
            )  # fmt: skip
    for name in outcome.fresh:
        yield Finding(
            "made-up", "error", targets, name, "the file lacks this tensor, and PEFT makes one up",
            "nothing", "a stored tensor", AGAIN,
        )  # fmt: skip


def _load(adapter: Adapter, names: Names) -> _Outcome:
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = adapter.config
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    values: dict[str, Any] = {
        **{key: value for key, value in config.items() if key in fields - _LEFT_OUT},
        "init_lora_weights": True,
    }
    if isinstance(velora := values.get("velora_config"), Mapping):
        # A random start is measured, which a tensor without values cannot be; the file has its own.
        values["velora_config"] = {**velora, "init_type": "batch_average"}
    adapter.check_patterns(names.state)
    tensors = {
        key: torch.empty(tensor.shape, device="meta") for key, tensor in adapter.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = None
        try:
            _check_layers(config)
            with torch.device("meta"):
                model = get_peft_model(copy.deepcopy(names.model), LoraConfig(**values))
            told = set_peft_model_state_dict(model, tensors)
            lost = set_peft_model_state_dict(model, _as_transformers(names, model, tensors))
        except Exception as error:  # whatever PEFT makes of a stranger's configuration
            both = model is None or isinstance(error, RuntimeError)  # shapes
            return _Outcome(" ".join(f"{type(error).__name__}: {error}".split())[:200], both)

    def matters(name: str) -> bool:
        # With bias="all" PEFT saves biases of whole modules twice, and loads them once. What is no
        # tensor of the class under any name was not trained in it.
        if of_training_alone(config, name):
            return False
        added = any(part in name for part in (".lora_", ".trainable_tokens_"))
        known = added or names.tensor(name.replace(PEFT_PREFIX, "")) is not None
        return known and ".modules_to_save." not in name

    unknown, ignored = (filter(matters, each.unexpected_keys) for each in (told, lost))
    fresh = _made_up(config, told.missing_keys, model)
    return _Outcome("", True, tuple(unknown), tuple(ignored), tuple(fresh))


def _as_transformers(names: Names, model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` under the names that transformers' own loader reads: it drops PEFT's prefix, and
    drops or adds the class's own."""
    own, state = f"{names.model.base_model_prefix}.", model.state_dict()

    def read(key: str) -> str:
        plain = as_transformers_reads(key)
        plain = names.inside(plain) or plain
        forms = [PEFT_PREFIX + form for form in (plain, own + plain, plain.removeprefix(own))]
        found = (form for form in forms if _ADAPTED.sub(r"\1.default\2", form) in state)
        return next(found, forms[0])

    return {read(key): tensor for key, tensor in tensors.items()}


def _made_up(config: Mapping[str, object], missing: list[str], model: Any) -> Iterator[str]:
    """Of the factors that a file lacks, those that matter: of a module of which it has others, or
    all where they do not begin as an update of zero."""
    begun = config.get("init_lora_weights") is not False
    lost = {name for name in missing if ".lora_" in name}
    held = {_layer(key) for key in model.state_dict() if ".lora_" in key and key not in lost}
    yield from (name for name in missing if name in lost and (not begun or _layer(name) in held))


def _layer(key: str) -> str:
    """The layer whose factor has the name `key`: torch's MultiheadAttention has two pairs."""
    return key.partition(".lora_")[0].removesuffix(ATTENTION_OUT)


def _check_layers(config: Mapping[str, object]) -> None:
    """Raise `ValueError` where PEFT would repeat layers without end."""
    ranges = config.get("layer_replication")
    for first, last in ranges if isinstance(ranges, list) else ():
        if not 0 <= first <= last <= _MOST_LAYERS:
            raise ValueError(f"layer_replication: {ranges}")
