"""guidellm, as `guidellm run` measures a server with texts that it makes up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, tokenizer = sys.argv[1:]
FORMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def run(form: str, report: Path) -> None:
    """Six requests in this form, two at once."""
    backend = f"kind=openai_http,target={url},model={model},request_format={form}"
    program = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
        *("--backend", backend, "--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=6"),
        *("--output", f"kind=json,path={report}"),
    ]
    subprocess.run(program, check=True)
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["requests"]["errored"] == [], form
    assert len(found["requests"]["successful"]) == 6


with tempfile.TemporaryDirectory() as folder:
    for form in FORMS:
        run(form, Path(folder, "report.json"))
print("all fine")
