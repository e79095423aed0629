"""The folder that is served changes while the server runs: its link leads elsewhere, a base becomes
another one, or is away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.errors import MissingError
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare.make import add, make_offer
from dora_serve.server.prepare.offer import Addition, Graph
from tests.conftest import MODELS, randomize
from tests.server.conftest import BASE, Server, started

PROMPT = "count : nine"


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a link to the first of two folders, each with the base and another run."""
    folder = tmp_path_factory.mktemp("changed")
    config = LoraConfig(r=3, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    for version in ("v1", "v2"):
        shutil.copytree(MODELS / BASE, folder / version / BASE)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODELS / BASE), config)
        randomize(model)
        model.save_pretrained(folder / version / ".runs" / "run")
    weights = folder / "v2" / ".runs" / "run" / "adapter_model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    (folder / "models").symlink_to("v1")
    with started(folder / "models", folder) as running:
        yield running


def load(server: Server, name: str) -> Any:
    body = {"lora_name": name, "lora_path": ".runs/run", "load_inplace": True}
    with server.http as http:
        return http.post("/v1/load_lora_adapter", json=body)


def logprob(server: Server, model: str) -> float:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 0}
    with server.http as http:
        told = http.post("/v1/completions", json={**body, "ignore_eos": True}).json()
    return float(told["choices"][0]["logprobs"]["token_logprobs"][0])


def live(folder: Path) -> float:
    """The likeliest token's, of PEFT's own model."""
    base = AutoModelForCausalLM.from_pretrained(folder / BASE)
    model = PeftModel.from_pretrained(base, str(folder / ".runs" / "run")).eval()
    ids = AutoTokenizer.from_pretrained(folder / BASE)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(torch.log_softmax(model(ids).logits[0, -1].double(), dim=-1).max())


def test_a_link_that_leads_elsewhere_by_now(linked: Server) -> None:
    """As a release is taken back, or git-sync goes on to the next commit."""
    first, second = (live(linked.root.parent / version) for version in ("v1", "v2"))
    assert first != pytest.approx(second, abs=1e-2)
    assert load(linked, "run").status_code == 200
    assert logprob(linked, "run") == pytest.approx(first, abs=1e-4)
    new = linked.root.with_name("new")
    new.symlink_to("v2")
    new.replace(linked.root)
    assert load(linked, "run").status_code == 200
    assert logprob(linked, "run") == pytest.approx(second, abs=1e-4)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_that_is_another_by_now_takes_no_run(linked: Server, name: str) -> None:
    file = linked.root / BASE / name
    before = file.read_text()
    said = json.loads(before)
    if name == "config.json":
        said["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}
    else:
        words = said["model"]["vocab"]
        words["nine"], words["two"] = words["two"], words["nine"]
    file.write_text(json.dumps(said))
    try:
        refused = load(linked, name)
    finally:
        file.write_text(before)
    assert refused.status_code == 400
    assert "no longer the one that is served" in refused.json()["error"]["message"]
    assert load(linked, name).status_code == 200


def test_a_base_that_is_away_keeps_no_run_of_others(
    linked: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(linked.root.parent / "cache"))
    offer = make_offer(linked.root, None, False, print, ServerOptions().precision)
    away = Graph(folder="none", task="causal-lm", base="away", path=str(linked.root / "away"))
    wanted = Addition(
        root=str(linked.root),
        path=str(linked.root / ".runs" / "run"),
        name="run",
        graphs=[away, *offer.graphs],
    )
    assert add(wanted).base == BASE
    gone = [each.model_copy(update={"folder": "gone"}) for each in offer.graphs]
    with pytest.raises(MissingError, match="the cache was emptied"):
        add(wanted.model_copy(update={"graphs": gone, "name": "other"}))
