"""What clients send, as vLLM and OpenAI name it. What is not served is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dora_serve.onnxruntime.sampling import Sampling

from .messages import Message, Several
from .parameters import Parameters

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Text = str | list[int]  # or its tokens
_Tokens = Annotated[list[Token], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _each(given: Any) -> list[Text]:
    """The texts of a field that takes one or several."""
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    return list(given) if several else [given]


class StreamOptions(Parameters):
    """`include_usage`: a last event with the usage; `continuous_usage_stats`: it in every event,
    of what was written so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextFormat(Parameters):
    type: Literal["text"]


class _Generate(Parameters):
    """What completions and chats have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    stream: bool = False
    response_format: TextFormat | None = None
    stream_options: StreamOptions | None = None
    request_id: Annotated[str, Field(max_length=200)] | None = None

    def sampling(self, index: int, max_tokens: int, logprobs: int | None) -> Sampling:
        """How choice `index` is drawn; each has a seed of its own."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else (self.seed + index) % 2**64,
            stop=tuple(stop),
            logprobs=logprobs,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(_Generate):
    """`POST /v1/completions`. `logprobs`: how many of the likeliest tokens to tell."""

    prompt: str | Several[str] | _Tokens | Several[_Tokens]
    max_tokens: Count = 16
    add_special_tokens: bool = True
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of is not served: every completion is told, give n alone")
        return self

    @property
    def prompts(self) -> list[Text]:
        return _each(self.prompt)


class _Conversation(Parameters):
    """What chat templates take."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template_values(self) -> dict[str, Any]:
        """What the chat template may name beside the messages."""
        return dict(self.chat_template_kwargs or {})

    @model_validator(mode="before")
    @classmethod
    def _one_end(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("continue_final_message") is True:
            if given.get("add_generation_prompt"):
                raise ValueError("give continue_final_message or add_generation_prompt, not both")
            return {**given, "add_generation_prompt": False}
        return given


class ChatRequest(_Generate, _Conversation):
    """`POST /v1/chat/completions`. Without a maximum the answer may fill the context."""

    messages: Annotated[Several[Message], Field(min_length=1)]
    add_special_tokens: bool | None = False
    documents: Annotated[list[dict[str, str]], Field(max_length=256, fail_fast=True)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    def template_values(self) -> dict[str, Any]:
        values = super().template_values()
        if self.documents:
            values["documents"] = self.documents
        if self.reasoning_effort is not None:
            values.setdefault("enable_thinking", self.reasoning_effort != "none")
            values["reasoning_effort"] = self.reasoning_effort
        return values


class ClassifyRequest(Parameters):
    """`POST /classify`, as vLLM has it."""

    model: str
    input: str | Annotated[Several[str], Field(min_length=1)]
    add_special_tokens: bool = True

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class EmbeddingRequest(Parameters):
    """`POST /v1/embeddings`."""

    model: str
    input: str | Several[str] | _Tokens | Several[_Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    add_special_tokens: bool = True

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class TokenizeRequest(_Conversation):
    """`POST /tokenize`: of a `prompt`, or of `messages` through the chat template."""

    kept_empty: ClassVar = frozenset({"prompt", "messages"})
    model: str
    prompt: str | None = None
    messages: Annotated[Several[Message], Field(min_length=1)] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(Parameters):
    """`POST /detokenize`."""

    model: str
    tokens: Annotated[list[Token], Field(max_length=2**18, fail_fast=True)]


class LoadRequest(Parameters):
    """`POST /v1/load_lora_adapter`. `lora_path`: a run or adapter below the served folder."""

    lora_name: Annotated[str, Field(pattern=r"^[\w][\w./=-]*$", max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4000)]
    load_inplace: bool = False


class UnloadRequest(Parameters):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None
