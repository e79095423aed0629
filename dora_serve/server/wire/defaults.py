"""What a request leaves open, as a model's `generation_config.json` says it and vLLM heeds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import MissingError
from converters.files.json_files import read_json
from dora_serve.onnxruntime.beams import Search
from dora_serve.onnxruntime.search_config import read_search
from dora_serve.onnxruntime.session import EngineError

Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(gt=0, le=1000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]

AUTO, NONE = "auto", "vllm"  # the model's own, or none
_FILE = "generation_config.json"
_OF_ANOTHER = ("longest", "ends")  # what another file than the model's own says
_MOST = 1 << 31  # tokens
_TOP_K = 50  # of what transformers draws, where nothing else is said


class Defaults(BaseModel):
    """None is what nothing is said of. `max_new_tokens`: of a chat, and of an encoder-decoder's
    answer; `longest`: of any answer; `ends`: the tokens that end one, beside the tokenizer's own,
    None for those of the model; `search`: how an encoder-decoder writes."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_new_tokens: Count | None = None
    longest: Count | None = None
    ends: frozenset[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    search: Search | None = None


def read_defaults(folder: Path, said: str, *, reads: bool = False) -> Defaults:
    """Those of the model in `folder`, as vLLM's `--generation-config` is `said`: "auto", "vllm" for
    none, or the folder of another file, whose maximum then bounds every answer, and whose ends
    are those of the model. `reads`: it is an encoder-decoder, whose file says what transformers'
    `generate` does, since vLLM serves none.

    Raises `DoraExportError` where another file is wanted and not there, or says what cannot be.
    """
    if said == NONE:
        return Defaults()
    path = (folder if said == AUTO else Path(said)) / _FILE
    if not path.exists() and said != AUTO:
        raise MissingError(
            "no such generation configuration",
            file=path,
            remedy="--generation-config auto, vllm, or a folder with this file",
        )
    read: dict[str, Any] = read_json(path) if path.exists() else {}
    given = {name: read.get(name) for name in Defaults.model_fields if name not in _OF_ANOTHER}
    given["search"] = read_search(read, path, _MOST) if reads else None
    if reads:
        longest = read.get("max_length")
        given["max_new_tokens"] = given["max_new_tokens"] or (longest and longest - 1)
        if not read.get("do_sample"):
            given["temperature"] = 0
        elif given["top_k"] is None:
            given["top_k"] = _TOP_K
    if said != AUTO:
        ends = read.get("eos_token_id", [])
        given |= {"longest": read.get("max_new_tokens")}
        given |= {"ends": ends if isinstance(ends, list) else [ends]}
    try:
        return Defaults(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineError(
            "the generation configuration cannot be heeded",
            file=path,
            found=f"{first['loc'][0]}: {first['msg']}",
            remedy="--generation-config vllm serves without it",
        ) from None
