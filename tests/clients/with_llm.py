"""llm: its command line, with the server in its file of models, as its docs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:3]
with tempfile.TemporaryDirectory() as folder:
    said = {"model_id": "here", "model_name": model, "api_base": f"{url}/v1"}
    more = {"supports_schema": True, "supports_tools": True}
    for kind in ({}, {"model_id": "completes", "completion": True}):
        with Path(folder, "extra-openai-models.yaml").open("a") as file:
            file.write(json.dumps([{**said, **more, **kind}]).strip("[]").join(("- ", "\n")))

    def llm(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        env = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ("-o", "temperature", "0", "-o", "max_tokens", "5")
    told = llm("-m", "here", *options, "Hello")
    assert llm("-m", "here", "--no-stream", *options, "Hello").rstrip("\n") == told.rstrip("\n")
    assert llm("-m", "completes", *options, "Hello") is not None
    longer = ("-o", "temperature", "0", "-o", "max_tokens", "500")
    schema = '{"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}'
    found = json.loads(llm("-m", "here", *longer, "--schema", schema, "Hello"))
    assert isinstance(found["on"], bool)
    assert llm("-c", *options, "more") is not None  # the conversation before goes along
print("all fine")
