"""lm-eval's scores of a merged model, of its ONNX export and of its adapter in `up` are those of
transformers; `make test-clients`."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve import merge, read_run, write_onnx
from dora_serve.server.options import ServerOptions
from tests.clients.test_clients import CLIENTS, HERE
from tests.conftest import MODELS
from tests.server.conftest import BASE, DOWN, started

COUNT, CHOICES = 200, 3
TASKS = {
    "choice": """
task: words_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "written": """
task: words_written
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["."], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def items() -> list[dict[str, Any]]:
    """Prompts with choices, and something that may be written."""
    draws = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / BASE)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    found = []
    for _ in range(COUNT):
        prompt = " ".join(draws.choices(words, k=4))
        choices = draws.sample(words, CHOICES)
        more = " ".join(draws.choices(words, k=3))
        label = draws.randrange(CHOICES)
        found.append({"prompt": prompt, "choices": choices, "label": label, "written": more})
    return found


def written(model: Any, tokenizer: Any, prompt: str) -> str:
    """What transformers' own model writes behind a prompt, with the space it begins with."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    before, whole = tokenizer.batch_decode([ids[0], out[0]], skip_special_tokens=True)
    return str(whole.removeprefix(before).split(".")[0])


def truth(folder: Path, docs: list[dict[str, Any]]) -> list[float]:
    """What transformers' own model scores, of the choices and of what it writes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = same = 0
    for doc in docs:
        ids = tokenizer(doc["prompt"])["input_ids"]
        scores = []
        for choice in doc["choices"]:
            (token,) = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        right += int(torch.stack(scores).argmax()) == doc["label"]
        same += written(model, tokenizer, doc["prompt"]) == doc["written"]
    return [right / len(docs), same / len(docs)]


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    if not CLIENTS.exists():
        pytest.skip("no .venv-clients here")
    root = tmp_path / "models"
    run = Path("runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down", DOWN)
    shutil.copytree(MODELS / BASE, root / BASE)
    shutil.copytree(MODELS / run, root / run)
    log = Path("runs/Log", *run.parts[2:])
    shutil.copytree(MODELS / log, root / log)
    merge(root / run, root / "merged", base=root / BASE)
    write_onnx(root / BASE, root / "exported", run=read_run(root / run))
    docs = items()
    model = AutoModelForCausalLM.from_pretrained(root / "merged").eval()
    words = AutoTokenizer.from_pretrained(root / "merged")
    for doc in docs[::2]:  # half of what is to be written is what the model writes
        doc["written"] = written(model, words, doc["prompt"])
    assert sum(bool(doc["written"]) for doc in docs[::2]) > COUNT // 10
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    names = ["merged", "exported", DOWN, BASE]
    with started(root, tmp_path, None, ServerOptions(threads=1)) as running:
        program = [CLIENTS, HERE / "with_lm_eval.py", running.url, root / BASE, tasks, *names]
        done = subprocess.run(
            [str(word) for word in program], capture_output=True, text=True, timeout=500
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = truth(root / "merged", docs)
    for name in names[:3]:
        assert found[name] == pytest.approx(expected, abs=1e-3), name
    assert found[BASE] == pytest.approx(truth(root / BASE, docs), abs=1e-3)
    assert found[BASE] != found["merged"]  # the control
    assert 0.4 < expected[1] < 1
