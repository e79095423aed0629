"""What transformers knows of a model class without its weights; imported only when needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ..errors import BaseError, TargetError
from .tasks import architecture_of

_HEAD = re.compile(r"(For[A-Z]\w*|LMHeadModel|(?<=Marian)MTModel|Model|PreTrainedModel)$")
# What transformers makes a module, or a name, of each of.
_LAYERS = r"n_layers?|(?!max_window_)\w*layers"
_PARTS = r"(\w*_)?depths?|num_\w*(block|stage|level|codebook|flow|group)s?|inner_group_num"
_EXPERTS = r"\w*experts"
_MOST, _MOST_LABELS, _FEW = 2_000, 1_000_000, 64
# Families whose positions are computed one by one in Python, and what they call the sizes.
_COMPUTED = (
    "autoformer distilbert flaubert informer marian pegasus roformer time_series_transformer xlm"
)
_POSITIONS = "max_position_embeddings|n_positions|context_length|prediction_length"
_WIDTHS = "d_model|dim|hidden_size|emb_dim"
_MOST_COMPUTED = 1 << 23
_SPARE = 1 << 24  # elements that a model may have beyond those of its file
_PACKED = 8  # elements in a byte, at the most


def class_for(config: Mapping[str, object], suffix: str) -> str:
    """The family's class with the head `suffix`, for example `RobertaForSequenceClassification`."""
    import transformers

    current = architecture_of(config)
    family = _HEAD.sub("", current)
    name = family + suffix
    if not family or not hasattr(transformers, name) or not _is_for(config, name):
        raise TargetError(
            "the base's family has no class for this task",
            found=f"architectures: {current or None}, model_type: {config.get('model_type')}",
            expected=f"a transformers class …{suffix}",
            remedy="set architectures in the base's config.json",
        )
    return name


def is_known(architecture: str | None, config: Mapping[str, object]) -> bool:
    """Whether transformers has the class, and the family of the configuration."""
    import transformers

    return hasattr(transformers, architecture or "") and (
        config.get("model_type") in transformers.CONFIG_MAPPING
    )


def _is_for(config: Mapping[str, object], name: str) -> bool:
    """Whether the class `name` is made of the base's kind of configuration, or of its text model's.

    Families share their first name with their text models, whose configurations are others.
    """
    import transformers

    family = config.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        return True
    kind = transformers.CONFIG_MAPPING[str(family)]
    kinds = (kind, getattr(kind, "sub_configs", {}).get("text_config"))
    return getattr(transformers, name).config_class in kinds


def empty_model(
    architecture: str, config: Mapping[str, object], num_labels: int | None = None
) -> Any:
    """A model of the class without weights, on the meta device, for the caller alone.

    Raises `BaseError` where transformers makes none of the configuration.
    """
    import torch
    import transformers

    values = {key: _decoded(value) for key, value in config.items()}
    if num_labels is not None:
        values.pop("id2label", None)
        values.pop("label2id", None)
        values["num_labels"] = num_labels
    try:
        check_counts(values)
        kind = transformers.CONFIG_MAPPING[str(values.pop("model_type"))]
        with offline(), torch.device("meta"):
            made, model = kind.from_dict(values), getattr(transformers, architecture)
            text = getattr(made, "sub_configs", {}).get("text_config")
            if text is not None and model.config_class is text:
                made = made.get_text_config()  # the text model alone of a multimodal base
            return model(made)
    except Exception as error:
        raise BaseError(
            "transformers cannot make this model from the base's config.json",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            expected=f"the configuration of a {architecture}",
            remedy="correct config.json, or install the transformers that the base was saved with",
        ) from error


def known_model(
    architecture: str, config: Mapping[str, object], num_labels: int | None = None
) -> Any:
    """`empty_model` to be asked and not changed: who asks for the same gets the same."""
    return _known(architecture, json.dumps(config), num_labels)


@lru_cache(maxsize=8)
def _known(architecture: str, config: str, num_labels: int | None) -> Any:
    return empty_model(architecture, json.loads(config), num_labels)


def _decoded(value: Any) -> Any:
    """A value with the numbers that JSON has not, as transformers writes them in an object
    (Mamba-2's `time_step_limit`); only its own reading of files decodes them."""
    if isinstance(value, Mapping):
        tag = value.get("__float__") if len(value) == 1 else None
        if tag in ("Infinity", "-Infinity", "NaN"):
            return float(str(tag))
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


@contextmanager
def offline() -> Iterator[None]:
    """Within, the hub's client asks nobody: some configurations name others, which transformers
    would fetch."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_size(
    architecture: str, config: Mapping[str, object], nbytes: int, num_labels: int | None = None
) -> None:
    """Raise `BaseError` where the model of the configuration is far larger than its files of
    `nbytes`: what they lack would be made, in memory, to be found missing then."""
    model = known_model(architecture, config, num_labels)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if elements > _PACKED * nbytes + _SPARE:
        raise BaseError(
            "the model of config.json is larger than its weights' files",
            found=f"{elements:,} elements in {architecture}",
            expected=f"what {nbytes:,} bytes can hold",
            remedy="correct config.json",
        )


def check_counts(config: Mapping[str, object], tensors: int | None = None) -> None:
    """Raise `ValueError` where transformers would make modules, labels or positions without end,
    or far more layers than a base of so many `tensors` can have."""
    numbers = [*_counts(config)]

    def largest(names: str) -> tuple[int, str]:
        return max(((n, key) for key, n in numbers if re.fullmatch(names, key)), default=(0, ""))

    def bound(count: int, what: str, most: int) -> None:
        if count > most:
            raise ValueError(f"{what} is {count}, over {most}")

    layers, experts = largest(_LAYERS), largest(_EXPERTS)
    for most in (layers, largest(_PARTS), experts):
        bound(*most, _MOST)
    bound(*largest("num_labels"), _MOST_LABELS)
    if tensors is not None:
        bound(*layers, max(_FEW, tensors))
        both = f"{layers[1]} times {experts[1]}"
        bound(layers[0] * experts[0], both, _FEW * (_FEW + tensors))
    if config.get("model_type") in _COMPUTED.split():
        (longest, name), (width, _) = largest(_POSITIONS), largest(_WIDTHS)
        bound(longest, name, _MOST_COMPUTED // max(1, width))


def _counts(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and those within it, by key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                yield str(key), each
