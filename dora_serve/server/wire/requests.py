"""What clients send, as vLLM and OpenAI name it. What is not served is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dora_serve.onnxruntime.sampling import Sampling

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Text = str | list[int]  # or its tokens
_T = TypeVar("_T")
_Tokens = Annotated[list[Token], Field(fail_fast=True)]
_Several = Annotated[list[_T], Field(max_length=2048, fail_fast=True)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


_NAMES = 64  # of one object


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _NAMES:  # each unknown one is an error
            raise ValueError(f"more than {_NAMES} names")
        return value


def _each(given: Any) -> list[Text]:
    """The texts of a field that takes one or several."""
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    return list(given) if several else [given]


class StreamOptions(_Request):
    """`include_usage`: a last event with the usage."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


class _Generate(_Request):
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
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken in their neutral form alone, since many clients send them always.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Says who asks: of no effect.
    user: str | None = None

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

    prompt: str | _Several[str] | _Tokens | _Several[_Tokens]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[Text]:
        return _each(self.prompt)


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Several[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class TextFormat(_Request):
    type: Literal["text"]


class ChatRequest(_Generate):
    """`POST /v1/chat/completions`. Without a maximum the answer may fill the context."""

    messages: Annotated[_Several[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool = True
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


class ClassifyRequest(_Request):
    """`POST /classify`, as vLLM has it."""

    model: str
    input: str | Annotated[_Several[str], Field(min_length=1)]
    user: str | None = None

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class EmbeddingRequest(_Request):
    """`POST /v1/embeddings`."""

    model: str
    input: str | _Several[str] | _Tokens | _Several[_Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class TokenizeRequest(_Request):
    """`POST /tokenize`: of a `prompt`, or of `messages` through the chat template."""

    model: str
    prompt: str | None = None
    messages: Annotated[_Several[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(_Request):
    """`POST /detokenize`."""

    model: str
    tokens: Annotated[list[Token], Field(max_length=2**18, fail_fast=True)]


class LoadRequest(_Request):
    """`POST /v1/load_lora_adapter`. `lora_path`: a run or adapter below the served folder."""

    lora_name: Annotated[str, Field(pattern=r"^[\w][\w./=-]*$", max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4000)]
    load_inplace: bool = False


class UnloadRequest(_Request):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None
