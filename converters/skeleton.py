"""What transformers knows of a model class without its weights; imported only when needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import TargetError


def class_for(config: Mapping[str, object], suffix: str) -> str:
    """The family's class with the head `suffix`, for example `RobertaForSequenceClassification`."""
    import transformers

    known = config.get("architectures")
    current = str(known[0]) if isinstance(known, list) and known else ""
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model|PreTrainedModel)$", "", current)
    name = family + suffix
    if not family or not hasattr(transformers, name):
        raise TargetError(
            "the base's family has no class for this task",
            found=f"architectures: {known}, model_type: {config.get('model_type')}",
            expected=f"a transformers class …{suffix}",
            remedy="set architectures in the base's config.json",
        )
    return name


def empty_model(
    architecture: str, config: Mapping[str, object], num_labels: int | None = None
) -> Any:
    """A model of the class without weights, on the meta device."""
    import torch
    import transformers

    values = dict(config)
    kind = transformers.CONFIG_MAPPING[str(values.pop("model_type"))]
    if num_labels is not None:
        values.pop("id2label", None)
        values.pop("label2id", None)
        values["num_labels"] = num_labels
    with torch.device("meta"):
        return getattr(transformers, architecture)(kind.from_dict(values))


def tensor_names(
    architecture: str, config: Mapping[str, object], num_labels: int | None
) -> list[str]:
    """The tensor names of the class, tied aliases and non-persistent buffers left out."""
    model = empty_model(architecture, config, num_labels)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name in model.state_dict() if name not in tied]
