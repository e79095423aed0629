"""What clients send, as vLLM and OpenAI name it. What is not served is refused, never ignored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    Discriminator,
    Field,
    RootModel,
    Tag,
    model_validator,
)

from .defaults import Count
from .forms import MARKS
from .messages import Message, Several
from .parameters import Object, Parameters, at_most, refusal
from .sampling import Generate, Token, Tokens, Top, Truncation
from .structure import Asked, asked_json
from .tools import Choice, Tools, schema_of_calls, wrong_choice

Text = str | list[int]  # or its tokens


def _each(given: Any) -> list[Text]:
    """The texts of a field that takes one or several."""
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    return list(given) if several else [given]


_TOKENS = 2**18  # of all inputs together: more would hold up others while they are read


def _not_too_many(given: list[list[int]]) -> list[list[int]]:
    if sum(map(len, given)) > _TOKENS:
        raise ValueError(f"more than {_TOKENS} tokens in all")
    return given


_SeveralTokens = Annotated[Several[Tokens], AfterValidator(_not_too_many)]


class CompletionRequest(Generate):
    """`POST /v1/completions`. `logprobs`: how many of the likeliest tokens to tell. `echo`: the
    prompt is told before each completion, which may have no tokens then."""

    prompt: str | Several[str] | Tokens | _SeveralTokens
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 16
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: Top | None = None
    best_of: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise refusal("best_of", "not served: every completion is told, give n alone")
        if self.prompt in ("", []):
            raise refusal("prompt", "it is empty")
        if self.use_beam_search and self.echo and self.logprobs is not None:
            raise refusal("echo", "not with logprobs and use_beam_search")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "0 needs echo")
        return self

    @property
    def told_of_prompt(self) -> int | None:
        """How many of the likeliest tokens are told of the prompt's own, None for none."""
        echoed = self.logprobs if self.echo else None
        return echoed if self.prompt_logprobs is None else self.prompt_logprobs

    @property
    def prompts(self) -> list[Text]:
        return _each(self.prompt)


class _Conversation(Parameters):
    """What chat templates take."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: Object | None = None
    tools: Tools | None = None

    def template_values(self) -> dict[str, Any]:
        """What the chat template may name beside the messages."""
        values: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.tools:
            values["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return values

    @model_validator(mode="before")
    @classmethod
    def _one_end(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("continue_final_message") is True:
            if given.get("add_generation_prompt"):
                raise refusal("continue_final_message", "not with add_generation_prompt")
            return {**given, "add_generation_prompt": False}
        return given


_Document = Annotated[dict[str, str], Field(max_length=32), at_most(32)]

_CALLS = 8192  # of tools, in all messages


class ChatRequest(Generate, _Conversation):
    """`POST /v1/chat/completions`. Without a maximum the answer may fill the context."""

    messages: Annotated[Several[Message], Field(min_length=1)]
    add_special_tokens: bool | None = False
    documents: Annotated[list[_Document], Field(max_length=256, fail_fast=True)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Top = 0

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "it needs logprobs")
        if wrong := wrong_choice(self.tools, self.tool_choice):
            raise refusal("tool_choice", wrong)
        if self.structured_outputs is not None and self.calls not in ("none", "auto"):
            raise refusal("structured_outputs", "not where a tool has to be called")
        if sum(len(message.tool_calls or ()) for message in self.messages) > _CALLS:
            raise refusal("messages", f"more than {_CALLS} calls of tools")
        return self

    @property
    def calls(self) -> Choice:
        """Which tools are called: those that the model wants where nothing is said."""
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def marks(self) -> tuple[str, ...]:
        return MARKS if self.tools and self.calls == "auto" else ()

    def structure(self) -> Asked | None:
        schema = schema_of_calls(self.tools or [], self.calls, self.parallel_tool_calls)
        return super().structure() if schema is None else asked_json(schema)

    def template_values(self) -> dict[str, Any]:
        values = super().template_values()
        if self.documents:
            values["documents"] = self.documents
        if self.reasoning_effort is not None:
            values.setdefault("enable_thinking", self.reasoning_effort != "none")
            values["reasoning_effort"] = self.reasoning_effort
        return values


class Texts(Truncation):
    """What encoders read."""

    model: str
    add_special_tokens: bool = True

    @property
    @abstractmethod
    def inputs(self) -> list[Text]:
        """Each is encoded for itself."""


class ClassifyRequest(Texts):
    """`POST /classify`, as vLLM has it. `use_activation` false: the logits, not probabilities."""

    input: str | Annotated[Several[str] | Tokens | _SeveralTokens, Field(min_length=1)]
    use_activation: bool | None = None

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class EmbeddingRequest(Texts):
    """`POST /v1/embeddings`. `dimensions`: how many are told, the first ones; `use_activation`
    true: of length one."""

    input: str | Several[str] | Tokens | _SeveralTokens
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    use_activation: bool | None = None

    @property
    def inputs(self) -> list[Text]:
        return _each(self.input)


class PoolingRequest(EmbeddingRequest):
    """`POST /pooling`, as vLLM has it. `use_activation` false: neither of length one, nor
    probabilities."""

    task: Literal["embed", "classify", "token_embed", "token_classify"] | None = None


_Side = str | Annotated[Several[str], Field(min_length=1)]


class ScoreRequest(Texts):
    """`POST /score`: two sides, under any of vLLM's names for them. `use_activation` false: of a
    model that reads both, its logits."""

    use_activation: bool | None = None

    text_1: _Side = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: _Side = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """Either, as a list."""
        both = (self.text_1, self.text_2)
        one, other = ([side] if isinstance(side, str) else side for side in both)
        return one, other

    @property
    def inputs(self) -> list[Text]:
        return [text for side in self.sides for text in side]


class AnswerRequest(Parameters):
    """`POST /dora/answer`: the part of `context` that answers `question`."""

    model: str
    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]
    max_answer_tokens: Annotated[int, Field(ge=1, le=2**18)] = 30


class TranscriptionRequest(Parameters):
    """`POST /v1/audio/transcriptions`, beside the file. `language`: its code, without it the model
    tells; `prompt`: text that came before."""

    model: str
    language: Annotated[str, Field(max_length=20)] | None = None
    prompt: str | None = None
    response_format: Literal["json", "text"] = "json"
    temperature: Annotated[float, Field(ge=0, le=0)] = 0
    max_completion_tokens: Count | None = None
    stream: Literal["false", "False", "0"] | None = None


class RerankRequest(Texts):
    """`POST /rerank`, which scores as `/score` does. `top_n`: how many documents are told, 0 for
    all."""

    use_activation: bool | None = None

    query: str
    documents: Annotated[Several[str], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @property
    def inputs(self) -> list[Text]:
        return [self.query, *self.documents]


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
    """`POST /v1/load_lora_adapter`. `lora_path`: a run or adapter below the served folder;
    `lora_name`: any name that one there can have, which may be its path."""

    lora_name: Annotated[str, Field(max_length=4000)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4000)]
    load_inplace: bool = False


class UnloadRequest(Parameters):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


_NAMES = {  # what tells a request from the others
    "messages": "chat",
    "prompt": "completion",
    "input": "embedding",
    "query": "rerank",
}


def _kind(body: Any) -> str:
    named = body if isinstance(body, dict) else {}
    return next((kind for name, kind in _NAMES.items() if name in named), "score")


class Invocation(
    RootModel[
        Annotated[
            Annotated[ChatRequest, Tag("chat")]
            | Annotated[CompletionRequest, Tag("completion")]
            | Annotated[EmbeddingRequest, Tag("embedding")]
            | Annotated[RerankRequest, Tag("rerank")]
            | Annotated[ScoreRequest, Tag("score")],
            Discriminator(_kind),
        ]
    ]
):
    """`POST /invocations`: a request to any of the routes."""
