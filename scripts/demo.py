"""The main job on a sample run: inspect, merge, repack, verify, and ask base and merged model.

python scripts/demo.py [OUT]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = Path("models/tiny-llama-base")
RUN = Path("models/runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1")
PROMPTS = ("count : nine", "count : twenty-one", "copy : cat moon river =")


def export(*arguments: object) -> None:
    """Run dora-export as a user would, showing the command."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ dora-export {shlex.join(words)}", flush=True)
    program = Path(sys.executable).parent / "dora-export"
    subprocess.run([program, *words], check=True, cwd=ROOT)


def answers(folder: Path) -> list[str]:
    """What the model in `folder` says to each prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said.append(
            tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return said


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out").resolve()
    merged, adapter = out / "merged", out / "adapter"
    export("inspect", RUN, "--base", BASE)
    export("merge", RUN, merged, "--base", BASE, "--force")
    export("verify", RUN, merged, "--base", BASE)
    export("adapter", RUN, adapter, "--base", BASE, "--target", "vllm", "--force")
    export("verify", RUN, adapter, "--base", BASE)
    print("\nThe same prompts, asked of the base and of the merged model:\n")
    for prompt, base, tuned in zip(PROMPTS, answers(ROOT / BASE), answers(merged), strict=True):
        print(f"  {prompt}\n    base    {base}\n    merged  {tuned}")


if __name__ == "__main__":
    main()
