"""What ms-swift notes of a run in `args.json` and in no file that goes along with a merge: it saves
no tokenizer and no configuration beside an adapter, and applies these again when it loads one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from ...errors import MissingError, TensorFileError, some
from ...files.json_files import read_json
from ...model.base import BaseModel
from ...run import Run
from .ends import number_of

_ARGUMENTS = "args.json"
_TUNERS = ("tuner_type", "train_type", "sft_type")  # as it was called in versions 4, 3 and 2
_REMEDY = "make a copy of the base with it, and name that as the base"


def other_arguments(run: Run, base: BaseModel) -> Iterator[str]:
    """A warning for tokens and for rotary embeddings that the run was trained with, and that the
    base, whose tokenizer and configuration go along, does not have."""
    said: Mapping[str, object] = {}
    with suppress(MissingError, TensorFileError):  # others' file: the run is read without it
        said = read_json(run.path / _ARGUMENTS)
    if not any(name in said for name in _TUNERS):
        return
    tokens = said.get("new_special_tokens")
    new = [each for each in tokens if isinstance(each, str)] if isinstance(tokens, list) else []
    own = (run.path / "tokenizer_config.json").is_file()
    unknown = [each for each in new if number_of(base.path, each) is None]
    if unknown and not own:
        yield (
            f"by {_ARGUMENTS} the run was trained with new tokens ({some(unknown)}), which the "
            "base's tokenizer, which goes along, does not have: texts with them become other "
            "tokens; add them to it in this order, and save it beside the adapter"
        )
    if (trained := _rotary(said.get("rope_scaling"))) is not None and trained != _of_base(base):
        yield (
            f"by {_ARGUMENTS} the run was trained with a rope_scaling ({trained[0]}) that the "
            f"base's configuration, which goes along, does not have: the result computes "
            f"otherwise; {_REMEDY}"
        )


def _of_base(base: BaseModel) -> tuple[str, object] | None:
    named = (base.config.get(name) for name in ("rope_parameters", "rope_scaling"))
    return next(filter(None, map(_rotary, named)), None)


def _rotary(said: object) -> tuple[str, object] | None:
    """Which form it has and its factor, None for the plain one."""
    if isinstance(said, str):
        return said, None
    if not isinstance(said, Mapping):
        return None
    kind = str(said.get("rope_type", said.get("type", "default")))
    return None if kind == "default" else (kind, said.get("factor"))
