"""The JSON of a choice, whole or what it grew by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from dora_serve.onnxruntime.request import Delta

from ..wire import pieces
from ..wire.calls import Calls, calls_of
from ..wire.forms import Tools
from ..wire.pieces import Choice, Decode, Json
from ..wire.requests import ChatRequest, CompletionRequest
from ..wire.sampling import Generate
from ..wire.tools import NamedTool


class Writer(ABC):
    """Of the answer to `body`. `decode`: the text of a token."""

    def __init__(self, body: Generate, decode: Decode) -> None:
        self._decode = decode
        if body.return_tokens_as_token_ids:
            self._decode = "token_id:{}".format
        self._tokens = body.return_token_ids
        self._shared: Sequence[int] | None = None

    @abstractmethod
    def __call__(self, index: int, grown: Choice | Delta) -> Json:
        """The choice `index`, or what it grew by."""

    def tells(self, delta: Delta) -> bool:
        """Whether something is told of a delta without text."""
        return bool(delta.logprobs) or self._tokens

    def beside(self, choices: Sequence[Choice]) -> Json:
        """What is told of all of them: of their prompt, where they have one and that is asked."""
        if self._shared is None:
            return {}
        told = choices[0].prompt_logprobs
        return {"prompt_logprobs": pieces.prompt_logprobs(self._shared, told, self._decode)}


class CompletionWriter(Writer):
    """Of `/v1/completions`. `prompts`: the tokens of every prompt; `echoed`: its text, where it is
    told."""

    def __init__(
        self,
        body: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        echoed: Sequence[str],
        decode: Decode,
    ) -> None:
        super().__init__(body, decode)
        self._body, self._prompts, self._echoed = body, prompts, echoed
        self._offsets: dict[int, int] = {}  # characters told of every choice that was begun

    def __call__(self, index: int, grown: Choice | Delta) -> Json:
        body, begins = self._body, index not in self._offsets
        prompt = self._prompts[index // body.n]
        written = grown if body.max_tokens else Choice(reason=grown.reason)
        text, told = written.text, None
        if body.echo and begins:
            text = self._echoed[index // body.n] + text
        if body.logprobs is not None:
            offset = self._offsets.get(index, 0)
            first = pieces.echoed(prompt, grown.prompt_logprobs) if body.echo and begins else []
            steps = [*first, *written.steps]
            told = pieces.completion_logprobs(steps, self._decode, offset)
            offset += sum(map(len, told["tokens"]))
            self._offsets[index] = offset
        self._offsets.setdefault(index, 0)
        choice: Json = {
            "index": index,
            "text": text,
            "logprobs": told,
            "finish_reason": grown.reason,
            "stop_reason": written.stop_reason,
        }
        if body.told_of_prompt is not None and not body.stream:
            choice["prompt_logprobs"] = pieces.prompt_logprobs(
                prompt, grown.prompt_logprobs, self._decode
            )
        if body.return_token_ids:
            choice["token_ids"] = [token for token, _ in grown.steps]
            choice["prompt_token_ids"] = list(prompt) if begins else None
        return choice


class ChatWriter(Writer):
    """Of `/v1/chat/completions`."""

    def __init__(self, body: ChatRequest, prompt: Sequence[int], decode: Decode) -> None:
        super().__init__(body, decode)
        self._body = body
        self._shared = None if body.prompt_logprobs is None else prompt
        functions = [tool.function for tool in body.tools or ()]
        self._tools = Tools({each.name: each.schema_of_arguments for each in functions})
        self._calls: dict[int, Calls | None] = {}  # of every choice that was begun

    def __call__(self, index: int, grown: Choice | Delta) -> Json:
        body, begins = self._body, index not in self._calls
        if begins:
            self._calls[index] = calls_of(body.calls, self._tools)
        calls, reason = self._calls[index], grown.reason
        message: Json = {"role": "assistant"} if begins else {}
        if calls is None:
            message["content"] = grown.text
        else:
            message |= self._called(*calls.add(grown.text, last=reason is not None))
            if calls.count and reason == "stop" and not isinstance(body.calls, NamedTool):
                reason = "tool_calls"
        choice: Json = {
            "index": index,
            "delta" if body.stream else "message": message,
            "logprobs": pieces.chat_logprobs(grown.steps, self._decode) if body.logprobs else None,
            "finish_reason": reason,
            "stop_reason": grown.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = [token for token, _ in grown.steps]
        return choice

    def _called(self, text: str, found: list[Json]) -> Json:
        """A message, or what it grew by, with the calls that were found: the first alone where
        several are not wanted."""
        if not self._body.parallel_tool_calls:
            found = [call for call in found if not call["index"]]
        if self._body.stream:
            return ({"content": text} if text else {}) | ({"tool_calls": found} if found else {})
        if not found:
            return {"content": text}
        whole = [{name: call[name] for name in ("id", "type", "function")} for call in found]
        return {"content": text.strip() or None, "tool_calls": whole}
