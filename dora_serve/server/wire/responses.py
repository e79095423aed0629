"""`/v1/responses` as OpenAI and vLLM have it: a chat under other names. Nothing of it is kept."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, PrivateAttr, Tag, model_validator

from .defaults import Count, MinP, Penalty, Repetition, Temperature, TopK, TopP
from .messages import Part, Several, form, plain_content
from .parameters import Object, Parameters, bounded, refusal
from .requests import ChatRequest
from .sampling import Biases, Metadata, RequestId, Seed, StopIds, Stops, Top
from .structure import StructuredOutputs
from .tools import Function, Named

Json = dict[str, Any]
_Any = Annotated[Any, AfterValidator(bounded)]


class _Piece(Part):
    """A piece of a text, with what is handed back beside that of an answer."""

    annotations: _Any = None
    logprobs: _Any = None


_Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[Several[_Piece], Tag("parts")], Discriminator(form)
]


class _Item(Parameters):
    kept_empty: ClassVar = frozenset({"content", "output", "arguments"})
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputMessage(_Item):
    """A turn, of the client or handed back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text
    phase: str | None = None


class InputCall(_Item):
    """A call of a tool that is handed back."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: None = None


class InputResult(_Item):
    """What a tool said."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Text


class InputThought(_Item):
    """What a model thought."""

    type: Literal["reasoning"]
    summary: Several[_Thought] | None = None
    content: Several[_Thought] | None = None
    encrypted_content: None = None


class _Thought(Parameters):
    type: Literal["summary_text", "reasoning_text"]
    text: str


_KINDS = {"message", "function_call", "function_call_output", "reasoning"}


def _kind(item: Any) -> str:
    kind = item.get("type") or "message" if isinstance(item, dict) else "message"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise refusal("type", f"{str(kind)[:50]!r} is not served: texts and calls of functions are")
    return kind


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputThought, Tag("reasoning")],
    Discriminator(_kind),
]


class Format(Parameters):
    """What the text has to be."""

    kept_empty: ClassVar = frozenset({"schema"})
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None

    def plain(self) -> Json:
        """As a chat takes it."""
        if self.type != "json_schema":
            return {"type": self.type}
        inner = {"name": self.name or "answer", "schema": self.schema_}
        return {"type": self.type, "json_schema": inner}


class Text(Parameters):
    format: Format | None = None


class Reasoning(Parameters):
    """`effort`: as a chat's `reasoning_effort`. Thoughts are not told from the rest."""

    effort: Annotated[str, Field(max_length=20)] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FunctionTool(Function):
    """A function, whose properties are the tool's own here."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise refusal("type", f"{kind[:50]!r} is not served: functions are")
        return given


class NamedFunction(Named):
    type: Literal["function"]


_Tools = Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)]
_Told = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
# Named as in a chat.
_SAME = (
    "model temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty "
    "seed stop stop_token_ids ignore_eos logit_bias skip_special_tokens metadata "
    "include_stop_str_in_output structured_outputs chat_template_kwargs parallel_tool_calls"
).split()


class ResponsesRequest(Parameters):
    """`POST /v1/responses`. `truncation` "auto": what is too long loses its begin."""

    kept_empty: ClassVar = frozenset({"input"})
    model: str
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[Several[Item], Field(min_length=1), Tag("parts")],
        Discriminator(form),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool = False
    logit_bias: Biases | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    include: Annotated[list[_Told], Field(max_length=8, fail_fast=True)] | None = None
    top_logprobs: Top = 0
    text: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: Object | None = None
    tools: _Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    stream: bool = False
    metadata: Metadata | None = None
    request_id: RequestId | None = None
    user: str | None = None
    prompt: None = None  # one that is stored: there are none
    _chat: ChatRequest = PrivateAttr()

    @model_validator(mode="after")
    def _is_a_chat(self) -> ResponsesRequest:
        if self.text is not None and self.text.format and self.structured_outputs is not None:
            raise refusal("structured_outputs", "not with text.format")
        self._chat = ChatRequest.model_validate(self._plain())
        return self

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat."""
        return self._chat

    def _plain(self) -> Json:
        given = self.model_dump(include=set(_SAME), exclude_none=True, by_alias=True)
        told = self.include is not None and "message.output_text.logprobs" in self.include
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            given["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif self.tools:
            given["tool_choice"] = choice
        elif choice == "required":
            raise refusal("tool_choice", "it needs tools")
        return {
            **given,
            "messages": self._messages(),
            "stream": True,  # whole or not, an answer is what its pieces make of it
            "continue_final_message": self._goes_on,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": told,
            "top_logprobs": self.top_logprobs if told else 0,
            "tools": [_tool(tool) for tool in self.tools or ()],
            "response_format": self.text and self.text.format and self.text.format.plain(),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "truncate_prompt_tokens": -1 if self.truncation == "auto" else None,
        }

    @property
    def _goes_on(self) -> bool:
        """Whether the answer goes on with a message that was broken off, as vLLM has it."""
        last = self.input[-1] if isinstance(self.input, list) else None
        return (
            isinstance(last, InputMessage)
            and last.role == "assistant"
            and last.status in ("in_progress", "incomplete")
        )

    def _messages(self) -> list[Json]:
        turns: list[Json] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        for item in self.input:
            _add(turns, item)
        return turns


def _tool(tool: FunctionTool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _add(turns: list[Json], item: InputMessage | InputCall | InputResult | InputThought) -> None:
    """Add an item to the turns it is one of, or a part of: thoughts, text and calls of a model in
    one another's wake are one turn."""
    if isinstance(item, InputResult):
        said = {"tool_call_id": item.call_id, "content": plain_content(item.output)}
        turns.append({"role": "tool", **said})
        return
    if isinstance(item, InputMessage) and item.role != "assistant":
        turns.append({"role": item.role, "content": plain_content(item.content)})
        return
    last = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    if isinstance(item, InputCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        new: Json = {"tool_calls": [*last.get("tool_calls", ()), call]}
    elif isinstance(item, InputThought):
        thought = "\n".join(each.text for each in item.content or item.summary or ())
        new = {"reasoning": thought}
    else:
        new = {"content": plain_content(item.content)}
    if last and (isinstance(item, InputCall) or not new.keys() & last.keys()):
        last.update(new)
    else:
        turns.append({"role": "assistant", **new})
