"""lm-eval: what a model thinks of choices, and what it writes, of a local task.

`with_lm_eval.py URL FOLDER TASKS NAME…`: FOLDER has the tokenizer, TASKS the task `words`.
"""

from __future__ import annotations

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

url, folder, tasks, *names = sys.argv[1:]
found = {}
for name in names:
    told = simple_evaluate(
        model="local-completions",
        model_args={
            "model": name,
            "base_url": f"{url}/v1/completions",
            "tokenizer": folder,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 8,
            "max_retries": 1,
            "max_length": 64,
            "add_bos_token": True,  # as the tokenizer by itself does
        },
        tasks=["words_choice", "words_written"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
    )
    assert told is not None
    scores = told["results"]
    found[name] = [
        scores["words_choice"]["acc,none"],
        scores["words_written"]["exact_match,none"],
    ]
print(json.dumps(found))
