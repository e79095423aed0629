"""What a configuration says otherwise than another one, beside what each model has of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import some
from ...model.architecture import offline
from ...model.base import BaseModel
from ...run import Run

# What a merge rightly has otherwise than its base, or what the prompts show.
_OWN = {
    *("architectures", "dtype", "torch_dtype", "_name_or_path", "tie_word_embeddings"),
    *("vocab_size", "use_cache", "quantization_config", "id2label", "label2id", "num_labels"),
}
# Trainer takes these from the tokenizer, whose end of texts is told by itself.
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_CONFIG = "config.json"


@offline()
def other_settings(run: Run, base: BaseModel) -> list[str]:
    """A warning where the configuration that a trainer saved beside the adapter is another than
    the base's, which goes along: axolotl saves the live model's, with what was changed of it."""
    if not (run.path / _CONFIG).is_file() or not (run.path / "adapter_config.json").is_file():
        return []
    from transformers import AutoConfig

    try:
        own, theirs = (
            AutoConfig.from_pretrained(each, trust_remote_code=False)
            for each in (run.path, base.path)
        )
    except Exception:  # of whatever kind: others' files, which nothing else is read of
        return []
    names = unlike(own.to_dict(), theirs.to_dict())
    names = [name for name in names if name.rpartition(".")[2] not in _TOKENS]
    if own.model_type != theirs.model_type or not names:
        return []
    return [
        f"{_CONFIG} beside the adapter has another {some(names)} than the base's, which goes "
        "along: where the run was trained with it, the result computes otherwise; make a copy of "
        "the base with the run's values, and name that as the base"
    ]


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of values, those in nested places too, that are not the same in both."""
    flat = [dict(_values(each)) for each in (one, other)]
    names = dict.fromkeys([*flat[1], *flat[0]])
    return [name for name in names if flat[0].get(name) != flat[1].get(name)]


def _values(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _OWN or "version" in key or key == "_from_model_config":
            continue
        if isinstance(value, Mapping):
            yield from _values(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
