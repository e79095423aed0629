"""What each verb's help shows: commands as users write them."""

from __future__ import annotations

EXAMPLES = {
    "inspect": ("inspect run/", "inspect run/ --base Qwen/Qwen3-0.6B --png ranks.png"),
    "merge": (
        "merge run/ merged/",
        "merge run/ merged/ --base meta-llama/Llama-3.2-1B --dtype bf16",
    ),
    "adapter": (
        "adapter run/ adapter/ --target vllm",
        "adapter run/ small/ --base base/ --max-rank 8",
    ),
    "export": ("export run/ out/ --base base/ --target lorax",),
    "extract": ("extract tuned/ adapter/ --base base/ --max-rank 32",),
    "diff": ("diff run/ adapter/ --base base/",),
    "onnx": (
        "onnx run/ onnx/ --base base/ --precision int4",
        "onnx many/ --base base/ --adapter one=run/ --adapter two=adapter/",
    ),
    "batch": ("batch runs/ adapters/ --workers 4", "batch runs/ merged/ --to merged"),
    "verify": ("verify run/ merged/ --base base/", "verify run/ adapter/ --engine vllm --json"),
    "check": ("check merged/",),
    "sign": ("sign merged/ --private-key key.pem",),
    "lint": (
        "lint adapter/ --base base/ --target vllm",
        "lint adapter/ --base base/ --target vllm --fix fixed/",
    ),
    "up": (
        "up models/",
        "up models/ --port 8001 --api-key KEY",
        "up models/ --engine vllm --live -- --max-model-len 4096",
    ),
    "plan": ("plan models/ --gpu-memory 80GB", "plan models/ --convert --yaml vllm.yaml"),
    "deploy": ("deploy models/ --to kubernetes --image IMAGE --output manifests/",),
    "watch": ("watch models/ --server http://127.0.0.1:8000",),
    "env": ("env", "env --json"),
}


def shown(program: str, verb: str) -> str:
    """The end of a help text; \\b keeps click from filling the lines."""
    lines = (f"  {program} {example}" for example in EXAMPLES[verb])
    return "\n".join(("\b", "Examples:", *lines))
