"""What transformers knows of a model class without its weights; imported only when needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import BaseError, TargetError
from .tasks import architecture_of

_HEAD = re.compile(r"(For[A-Z]\w*|LMHeadModel|(?<=Marian)MTModel|Model|PreTrainedModel)$")
# What transformers makes a module, or a name, of each of.
_MOST = {r"n_layers?|\w+_layers|\w*experts": 2_000, "num_labels": 1_000_000}


def class_for(config: Mapping[str, object], suffix: str) -> str:
    """The family's class with the head `suffix`, for example `RobertaForSequenceClassification`."""
    import transformers

    current = architecture_of(config)
    family = _HEAD.sub("", current)
    name = family + suffix
    if not family or not hasattr(transformers, name):
        raise TargetError(
            "the base's family has no class for this task",
            found=f"architectures: {current or None}, model_type: {config.get('model_type')}",
            expected=f"a transformers class …{suffix}",
            remedy="set architectures in the base's config.json",
        )
    return name


def empty_model(
    architecture: str, config: Mapping[str, object], num_labels: int | None = None
) -> Any:
    """A model of the class without weights, on the meta device.

    Raises `BaseError` where transformers makes none of the configuration.
    """
    import torch
    import transformers

    values = dict(config)
    if num_labels is not None:
        values.pop("id2label", None)
        values.pop("label2id", None)
        values["num_labels"] = num_labels
    try:
        _check_counts(values)
        kind = transformers.CONFIG_MAPPING[str(values.pop("model_type"))]
        made, model = kind.from_dict(values), getattr(transformers, architecture)
        text = getattr(made, "sub_configs", {}).get("text_config")
        if text is not None and model.config_class is text:
            made = made.get_text_config()  # the text model alone of a multimodal base
        with torch.device("meta"):
            return model(made)
    except Exception as error:
        raise BaseError(
            "transformers cannot make this model from the base's config.json",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            expected=f"the configuration of a {architecture}",
            remedy="correct config.json, or install the transformers that the base was saved with",
        ) from error


def _check_counts(config: Mapping[str, object]) -> None:
    """Raise `ValueError` where transformers would make modules, or labels, without end."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value)
        for counts, most in _MOST.items():
            if isinstance(value, int) and value > most and re.fullmatch(counts, key):
                raise ValueError(f"{key} is {value}, over {most}")
