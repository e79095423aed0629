"""langchain-openai: chats, batches, bound tools, structured output."""

from __future__ import annotations

import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

url, model = f"{sys.argv[1]}/v1", sys.argv[2]
options: Any = {"model": model, "base_url": url, "api_key": "none", "max_retries": 0}
chat = ChatOpenAI(temperature=0, max_tokens=5, **options)
first = chat.invoke("Hello")
assert "".join(str(piece.content) for piece in chat.stream("Hello")) == first.content
assert chat.invoke([("user", "Hello"), first, ("user", "more")]).response_metadata
assert len(chat.batch(["a", "b", "c"])) == 3
tool = {
    "type": "function",
    "function": {"name": "now", "description": "d", "parameters": {"type": "object"}},
}
assert chat.bind_tools([tool]).invoke("Hello").response_metadata
schema = {
    "title": "light", "type": "object", "properties": {"on": {"type": "boolean"}},
    "required": ["on"], "additionalProperties": False, "description": "d",
}  # fmt: skip
longer = ChatOpenAI(temperature=0, max_tokens=500, **options)
for method in ("json_schema", "function_calling"):
    told: Any = longer.with_structured_output(schema, method=method).invoke("Hello")
    assert told.keys() == {"on"}, (method, told)
assert OpenAI(temperature=0, max_tokens=6, **options).invoke("Hello") is not None
print("all fine")
