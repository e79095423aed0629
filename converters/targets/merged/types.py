"""The types of tokens, which PEFT's model for question answering keeps from the model inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from ...errors import MissingError, TensorFileError
from ...files.json_files import read_json
from ...model.base import BaseModel
from ...model.tasks import task_of_peft
from ...run import Run

_TASK, _TYPES = "question-answering", "token_type_ids"


def dropped_types(run: Run, base: BaseModel) -> Iterator[str]:
    """A warning where PEFT trained the run without the types that tell a question from its context
    (`PeftModelForQuestionAnswering.forward` takes them, and hands none on), while the base takes
    them and its tokenizer gives them to whoever computes the result."""
    kinds = base.config.get("type_vocab_size")
    if run.task != _TASK or not isinstance(kinds, int) or kinds < 2:
        return
    said: Mapping[str, object] = {}
    tokenizer: Mapping[str, object] = {}
    with suppress(MissingError, TensorFileError):  # a run of another method
        said = read_json(run.path / "adapter_config.json")
    with suppress(MissingError, TensorFileError):
        tokenizer = read_json(base.path / "tokenizer_config.json")
    names = tokenizer.get("model_input_names")
    given = not isinstance(names, list) or _TYPES in names
    if given and task_of_peft(said.get("task_type")) == _TASK:
        yield (
            f"PEFT's model for question answering hands no {_TYPES} on, so that the run was "
            "trained without them, and with those that the base's tokenizer gives the result "
            f"computes otherwise: take {_TYPES} out of model_input_names in a copy of the base's "
            "tokenizer_config.json, and name that as the base"
        )
