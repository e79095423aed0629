"""instructor: objects by tools and by schema."""

from __future__ import annotations

import sys

import instructor
import openai
from pydantic import BaseModel


class Light(BaseModel):
    on: bool


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
    told = instructor.from_openai(client, mode=mode).chat.completions.create(
        model=sys.argv[2],
        messages=[{"role": "user", "content": "Hello"}],
        response_model=Light,
        max_retries=1,
        max_tokens=500,
        # A model of random weights may fill any length with white space: not by chance, then.
        seed=1,
    )
    assert isinstance(told, Light), mode
print("all fine")
