"""guidellm, as `guidellm run` measures a server: texts that it makes up, in each form of request;
chats of two turns, the first of which calls a tool."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, tokenizer = sys.argv[1:]
FORMS = {
    "/v1/completions": "",
    "/v1/chat/completions": ",turns=2,tool_call_turns=1",
    "/v1/responses": ",turns=2,prefix_tokens=8",
}
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    for form, more in FORMS.items():
        program = [
            *(str(Path(sys.executable).with_name("guidellm")), "run"),
            *("--backend", f"kind=openai_http,target={url},model={model},request_format={form}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens=8{more}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", "kind=max_requests,count=6"),
            *("--output", f"kind=json,path={report}"),
            "--disable-console",
        ]
        subprocess.run(program, check=True)
        (found,) = json.loads(report.read_text())["benchmarks"]
        requests = found["requests"]
        assert len(requests["successful"]) == 6, (form, requests["errored"])
        assert requests["errored"] == []
print("all fine")
