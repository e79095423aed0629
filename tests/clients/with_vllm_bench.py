"""vLLM's own benchmark, as `vllm bench serve` runs it, with two of its backends."""

from __future__ import annotations

import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

url, model, tokenizer = sys.argv[1:]
for backend, path in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = f"--backend {backend} --base-url {url} --endpoint {path} --model {model}"
    words += f" --tokenizer {tokenizer} --dataset-name random --random-input-len 16"
    words += " --random-output-len 8 --num-prompts 6"
    found = main(parser.parse_args(words.split()))
    assert found is None or found["completed"] == 6
print("all fine")
