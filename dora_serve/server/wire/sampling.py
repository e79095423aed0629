"""How a completion is drawn and what is told of it, as vLLM names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from dora_serve.onnxruntime.beams import Search
from dora_serve.onnxruntime.grammar import Grammar
from dora_serve.onnxruntime.sampling import Sampling

from .defaults import Defaults, MinP, Penalty, Repetition, Temperature, TopK, TopP
from .errors import ApiError
from .parameters import Parameters, at_most, refusal
from .structure import Asked, ResponseFormat, StructuredOutputs, asked

_T = TypeVar("_T")
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Top = Annotated[int, Field(ge=0, le=20)]
_Id = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Stops = Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)]
StopIds = Annotated[Tokens, Field(max_length=1024)]
Biases = Annotated[dict[_Id, float], Field(max_length=1024), at_most(1024)]
RequestId = Annotated[str, Field(max_length=200)]
Metadata = Annotated[dict[str, str], Field(max_length=16), at_most(16)]


# What beam search, which draws nothing, does not heed, with what is no use of it.
_NOT_WITH_BEAMS = {
    "stream": False,
    "stop": [],
    "stop_token_ids": [],
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "allowed_token_ids": [],
    "bad_words": [],
    "prompt_logprobs": None,
    "structured_outputs": None,
}


# What says how an answer is drawn or shaped, so that it is not looked for by beams, with what says
# nothing of it.
_DRAWN = {
    **{name: neutral for name, neutral in _NOT_WITH_BEAMS.items() if name != "stream"},
    "n": 1,
    "temperature": None,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "ignore_eos": False,
    "use_beam_search": False,
    "logprobs": None,
    "response_format": None,
}


class StreamOptions(Parameters):
    """`include_usage`: a last event with the usage; `continuous_usage_stats`: it in every event,
    of what was written so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Truncation(Parameters):
    """`truncate_prompt_tokens`: how many tokens of a prompt are kept, -1 for as many as there is
    room for: of what is gone on with the last ones, of what an encoder reads the first ones, what
    the tokenizer puts around a text among them. With a side tokens are cut off there as they
    are."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    @model_validator(mode="after")
    def _keeps_something(self) -> Truncation:
        if self.truncate_prompt_tokens == 0:
            raise refusal("truncate_prompt_tokens", "nothing would be left")
        return self

    def kept(self, longest: int) -> int | None:
        """How many tokens of a prompt are kept, None for all."""
        return longest if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens


class Generate(Truncation):
    """What completions and chats have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: Annotated[Tokens, Field(max_length=2**18)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=64, fail_fast=True)] | None = None
    prompt_logprobs: Top | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-50, le=50)] = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: RequestId | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _told_whole(self) -> Generate:
        if self.stream and self.prompt_logprobs:
            raise refusal("prompt_logprobs", "they are not told in a stream")
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and self.structured_outputs is not None:
            raise refusal("structured_outputs", "not with response_format")
        for name, neutral in _NOT_WITH_BEAMS.items() if self.use_beam_search else ():
            if getattr(self, name) not in (None, neutral):
                raise refusal(name, "not with use_beam_search")
        return self

    @property
    def marks(self) -> tuple[str, ...]:
        """The special tokens that are read in the answer, whether or not others are told."""
        return ()

    def structure(self) -> Asked | None:
        """What the answer has to follow. Raises `ValueError` for what nothing can."""
        return asked(self.response_format, self.structured_outputs)

    def _search(self, defaults: Defaults, max_tokens: int) -> Search | None:
        """What of an encoder-decoder's search is left open."""
        if defaults.search is None:
            return None
        search = replace(defaults.search, max_tokens=max_tokens)
        if all(getattr(self, name, None) in (None, free) for name, free in _DRAWN.items()):
            return search
        return replace(search, beams=1, min_tokens=0 if self.min_tokens else search.min_tokens)

    def samplings(
        self,
        max_tokens: int,
        logprobs: int | None,
        bad_words: tuple[tuple[int, ...], ...],
        prompt_logprobs: int | None,
        grammar: Grammar | None,
        defaults: Defaults,
    ) -> list[Sampling]:
        """How every choice is drawn; each has a seed of its own, and none for -1. Raises `ApiError`
        for a least number of tokens above the most."""
        if self.min_tokens > max_tokens:
            raise ApiError(f"min_tokens is more than {max_tokens}", param="min_tokens")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seeded = self.seed is not None and self.seed != -1
        biases = (self.logit_bias or {}).items()
        one = Sampling(
            max_tokens=max_tokens,
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            top_k=max(_first(self.top_k, defaults.top_k, 0), 0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            stop=tuple(stop),
            logprobs=logprobs,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            marks=self.marks,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=bad_words,
            logit_bias=tuple((int(key), min(100.0, max(-100.0, value))) for key, value in biases),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=_first(self.presence_penalty, defaults.presence_penalty, 0.0),
            frequency_penalty=_first(self.frequency_penalty, defaults.frequency_penalty, 0.0),
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            search=self._search(defaults, max_tokens),
        )
        if not seeded:
            return [one] * self.n
        return [replace(one, seed=((self.seed or 0) + i) % 2**64) for i in range(self.n)]


def _first(given: _T | None, default: _T | None, neutral: _T) -> _T:
    """What a request says, else what its model does."""
    return next((each for each in (given, default) if each is not None), neutral)
