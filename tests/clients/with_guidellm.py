"""guidellm, as `guidellm run` measures a server: texts that it makes up, in each form of request;
chats of two turns, the first of which calls a tool."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

url, model, tokenizer = sys.argv[1:]
# What may be said of it is bounded, since a model of random weights ends no text.
ANSWER = {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": ANSWER}}
FORMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {},
    "/v1/chat/completions": {"turns": 2, "tool_call_turns": 1, "tools": [TOOL]},
    "/v1/responses": {"turns": 2, "prefix_tokens": 8},
}
EXTRAS = {"/v1/chat/completions": {"body": {"temperature": 0, "parallel_tool_calls": False}}}


def run(form: str, report: Path) -> dict[str, Any]:
    """What guidellm tells of six requests, two at once."""
    backend = {"kind": "openai_http", "target": url, "model": model, "request_format": form}
    texts = {"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": 8, **FORMS[form]}
    program = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
        *("--backend", json.dumps({**backend, "extras": EXTRAS.get(form)})),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", json.dumps(texts), "--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=6"),
        *("--output", f"kind=json,path={report}"),
    ]
    subprocess.run(program, check=True)
    (found,) = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, Any] = found["requests"]
    return requests


with tempfile.TemporaryDirectory() as folder:
    for form in FORMS:
        found = run(form, Path(folder, "report.json"))
        assert found["errored"] == [], (form, [each["info"]["error"] for each in found["errored"]])
        assert len(found["successful"]) == 6
        calls = [each["output_metrics"]["tool_call_count"] for each in found["successful"]]
        assert any(calls) == ("tools" in FORMS[form])
print("all fine")
