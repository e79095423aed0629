"""litellm: its two ways to a server of this kind."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

url, model = f"{sys.argv[1]}/v1", sys.argv[2]
asked = [{"role": "user", "content": "Hello"}]
for provider in ("openai", "hosted_vllm"):
    options: Any = {"model": f"{provider}/{model}", "api_base": url, "api_key": "none"}
    options |= {"temperature": 0, "max_tokens": 5, "num_retries": 0}
    done = litellm.completion(messages=asked, **options)
    text = done.choices[0].message.content
    pieces = litellm.completion(messages=asked, stream=True, **options)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    turns = [*asked, done.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    assert litellm.completion(messages=turns, **options).usage.completion_tokens
    assert litellm.completion(messages=asked, response_format={"type": "json_object"}, **options)
print("all fine")
