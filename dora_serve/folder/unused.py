"""What a run brings along that is not used where it is served beside others on its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from converters.errors import DoraExportError, some
from converters.model.base import BaseModel
from converters.run import Run
from converters.targets.merged.ends import added_beyond, end_beyond
from converters.targets.merged.types import dropped_types

from .templates import chat_templates


def unused(run: Run, base: BaseModel) -> Iterator[str]:
    """What is to be said of a run with a template, tokens or an end of texts of its own where
    `base`'s are used: engines have one tokenizer for a base and all that is served with it, as vLLM
    has. Of the base it is told elsewhere what cannot be read, and of the run it is not used."""
    yield from dropped_types(run, base)
    with suppress(DoraExportError):
        own = chat_templates(run.path)
        if own and own != chat_templates(base.path):
            yield (
                f"its own chat template is not used, that of {base.name} is: --chat-template gives "
                "another, and merged it has its own"
            )
    if added := added_beyond(run, base):
        yield (
            f"its own tokenizer is not used, that of {base.name} is, which lacks {some(added)}: "
            "texts with such become other tokens; merged it has its own"
        )
    if (found := end_beyond(run, base)) is not None:
        end, token, known = found
        yield (
            f"its own tokenizer ends texts with {end} ({token}), and those of {base.name} end with "
            f"{known}: where it was trained to end so, ask with stop_token_ids of {token}, or put "
            "it into eos_token_id of the base's generation_config.json"
        )
