"""Which token ends an answer, and which fills up a row: by the tokenizer that was saved with a run,
and by the base's configuration, which goes along with a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...errors import TensorFileError
from ...files.json_files import read_json
from ...model.base import BaseModel
from ...run import Run

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_GENERATION = "generation_config.json"
_HEAD = 4 << 20  # bytes
_DIGITS = 10


def other_end(run: Run, base: BaseModel) -> Iterator[str]:
    """A warning where the run's tokenizer ends texts with a token with which the base's
    configuration ends none: Trainer adds it to the live model's, which no adapter holds."""
    if (found := end_beyond(run, base)) is not None:
        end, token, known = found
        yield (
            f"the run's tokenizer ends texts with {end} ({token}), and the base's configuration, "
            f"which goes along, with {known}: who ends answers by the configuration, as "
            f"transformers does, writes on behind {end}; where the run was trained to end with it, "
            f"put {token} into eos_token_id of {_GENERATION}"
        )


def end_beyond(run: Run, base: BaseModel) -> tuple[str, int, str] | None:
    """The token with which the run's tokenizer ends texts and neither the base's nor its
    configuration does, its number, and with what they do; None where there is none."""
    end = _named(run.path, "eos_token")
    writes = run.task is None or run.task.endswith("-lm")
    if end is None or end == _named(base.path, "eos_token") or not writes:
        return None
    token = number_of(run.path, end)
    said = _read(base.path / _GENERATION).get("eos_token_id", base.config.get("eos_token_id"))
    ends = said if isinstance(said, list) else [said]
    if token is None or said is None or token in ends:
        return None
    return end, token, ", ".join(map(str, ends))


def other_pad(run: Run, base: BaseModel) -> Iterator[str]:
    """A warning where the run's tokenizer fills rows up with another token than that behind which
    the base's configuration looks for a text's last: a classifier made of a decoder, such as a
    reward model, gives its score there. No adapter holds what the live model's was."""
    pad = _named(run.path, "pad_token")
    if pad is None or run.task != "sequence-classification":
        return
    token, known = number_of(run.path, pad), base.config.get("pad_token_id")
    if token is not None and token != known:
        yield (
            f"the run's tokenizer fills rows up with {pad} ({token}), and the base's "
            f"configuration, which goes along, with {known}: a classifier that looks for a text's "
            f"last token by it, as those made of decoders do, computes otherwise in batches; where "
            f"the run was trained with it, put {token} into pad_token_id of the merged config.json"
        )


def _read(file: Path) -> dict[str, object]:
    with suppress(TensorFileError):  # others' files: who loads the tokenizer tells it
        return read_json(file) if file.is_file() else {}
    return {}


def _named(folder: Path, role: str) -> str | None:
    """The token of that role, such as `eos_token`, by the tokenizer in `folder`."""
    said = _read(folder / _CONFIG).get(role)
    said = said.get("content") if isinstance(said, dict) else said
    return said if isinstance(said, str) else None


def added_beyond(run: Run, base: BaseModel) -> list[str]:
    """The tokens that were added to the run's tokenizer and not, or by another number, to the
    base's, but for what fills rows up; none where the base's files do not tell."""
    own, pad = _added(run.path), _named(run.path, "pad_token")
    known = _added(base.path) if own else {}
    others = [word for word, number in own.items() if known.get(word) != number and word != pad]
    return others if known else []


def _added(folder: Path) -> dict[str, int]:
    """The tokens that were added to the tokenizer in `folder`, with their numbers. The list stands
    before the vocabulary, which has 20 MB and is not read."""
    listed: object = []
    with suppress(OSError, ValueError, RecursionError):
        if (folder / _TOKENIZER).is_file():
            with (folder / _TOKENIZER).open("rb") as file:
                head = file.read(_HEAD).decode(errors="ignore")
            begin = re.search(r'"added_tokens"\s*:\s*', head)
            listed = json.JSONDecoder().raw_decode(head, begin.end())[0] if begin else []
    found = {}
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, dict) and type(number := each.get("id")) is int:
            found[str(each.get("content"))] = number
    decoder = _read(folder / _CONFIG).get("added_tokens_decoder")
    for number, each in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(each, dict) and number.isdecimal() and len(number) < _DIGITS:
            found[str(each.get("content"))] = int(number)
    return found


def number_of(folder: Path, word: str) -> int | None:
    """The number of `word`, where the tokenizer's files tell it as transformers writes them."""
    added = _read(folder / _CONFIG).get("added_tokens_decoder")
    found = dict(added) if isinstance(added, dict) else {}
    whole = _read(folder / _TOKENIZER)
    more, model = whole.get("added_tokens"), whole.get("model")
    for each in more if isinstance(more, list) else []:
        if isinstance(each, dict):
            found[str(each.get("id"))] = each
    for number, each in found.items():
        if isinstance(each, dict) and each.get("content") == word and number.isdecimal():
            return int(number)
    vocab = model.get("vocab") if isinstance(model, dict) else None
    known = vocab.get(word) if isinstance(vocab, dict) else None
    return known if type(known) is int else None
