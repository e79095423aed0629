"""What clients get, in OpenAI's and vLLM's shapes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from ..prepare.offer import Module

Finish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: those that were not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(BaseModel):
    """One entry per token; `text_offset` counts characters of the completion."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(BaseModel):
    """`rank`: how many tokens are as likely or likelier, itself among them."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """Of `/v1/completions`; a streamed one comes in pieces of the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """`arguments`: JSON as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """`content` may be missing where tools are called."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Of `/v1/chat/completions`, when it is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Label(BaseModel):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class Classification(BaseModel):
    """Of `/classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Label]
    usage: Usage


class Embedding(BaseModel):
    """`embedding`: numbers, or their little-endian float32 bytes in base64."""

    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Of `/v1/embeddings`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class Pooled(BaseModel):
    """`data`: numbers, of every token where that is asked for, or all of them in base64."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | list[float] | str


class Pooling(BaseModel):
    """Of `/pooling`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class Answer(BaseModel):
    """Of `/dora/answer`: the characters `start` to `end` of the context, and their probability."""

    id: str
    object: Literal["answer"] = "answer"
    created: int
    model: str
    answer: str
    start: int
    end: int
    score: float
    usage: Usage


class Heard(BaseModel):
    """How long a sound was."""

    type: Literal["duration"] = "duration"
    seconds: int


class Transcription(BaseModel):
    """Of `/v1/audio/transcriptions`."""

    text: str
    usage: Heard


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(BaseModel):
    """Of `/score`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Document(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    document: Document
    relevance_score: float


class Ranking(BaseModel):
    """Of `/rerank`."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]


class Version(BaseModel):
    version: str


class Load(BaseModel):
    """Of `/load`: how many rows run or wait."""

    server_load: int


class Tokens(BaseModel):
    """Of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """Of `/detokenize`."""

    prompt: str


class ModelCard(BaseModel):
    """`parent`: the base of a run or adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dora-serve"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDetails(BaseModel):
    """What OpenAI's model list has no place for. `requests`: how many so far; `loaded`: whether an
    adapter is in memory now, always true of a base; `chat`: whether it has a chat template;
    `labels`: the names of its classes, where the base has some."""

    id: str
    kind: Literal["base", "merged", "run", "adapter"]
    method: str | None
    task: str
    base: str | None
    parameters: int
    bytes: int
    modules: dict[str, Module]
    requests: int
    loaded: bool
    chat: bool
    labels: list[str]


class DetailsList(BaseModel):
    """`not_served`: what else the folder has, with the reason."""

    data: list[ModelDetails]
    not_served: dict[str, str]


class Status(BaseModel):
    status: Literal["ok"] = "ok"
