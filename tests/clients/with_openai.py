"""openai, sync and async: answers, streams, objects, tools, the next turn."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

url, model = f"{sys.argv[1]}/v1", sys.argv[2]
client = OpenAI(base_url=url, api_key="none", max_retries=0)
asked: Any = [{"role": "user", "content": "Hello"}]
options: Any = {"model": model, "temperature": 0}


class Light(BaseModel):
    on: bool


TOOL: Any = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}},
}

first = client.chat.completions.create(**options, messages=asked, max_completion_tokens=5)
turns: Any = [*asked, first.choices[0].message, {"role": "user", "content": "more"}]
assert client.chat.completions.create(**options, messages=turns, max_tokens=5).usage
# The helper wants answers that end.
stream: Any = {"stream_options": {"include_usage": True}, "max_tokens": 20}
stream["extra_body"] = {"structured_outputs": {"choice": ["yes"]}}
with client.chat.completions.stream(**options, messages=asked, **stream) as events:
    for _ in events:
        pass
    final = events.get_final_completion()
assert final.choices[0].message.content == "yes"
assert final.usage is not None
assert final.usage.completion_tokens > 1
parsed = client.chat.completions.parse(
    **options, messages=asked, max_tokens=500, response_format=Light
)
assert isinstance(parsed.choices[0].message.parsed, Light)
called = client.chat.completions.create(
    **options, messages=asked, max_tokens=500, tools=[TOOL], tool_choice="required",
    parallel_tool_calls=False,
)  # fmt: skip
(call,) = called.choices[0].message.tool_calls or []
assert json.loads(call.function.arguments) == {}
turns = [
    *asked,
    called.choices[0].message,
    {"role": "tool", "tool_call_id": call.id, "content": "noon"},
]
assert client.chat.completions.create(**options, messages=turns, tools=[TOOL], max_tokens=3).id
scored = client.completions.create(
    model=model, prompt="Hello", max_tokens=0, echo=True, logprobs=1, temperature=0
)
assert scored.choices[0].logprobs is not None
assert (scored.choices[0].logprobs.token_logprobs or [])[0] is None


async def many() -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as other:
        made = [
            other.chat.completions.create(**options, messages=asked, max_tokens=5) for _ in range(8)
        ]
        texts = {each.choices[0].message.content for each in await asyncio.gather(*made)}
    assert texts == {first.choices[0].message.content}


asyncio.run(many())
print("all fine")
