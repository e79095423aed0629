"""Of a folder with many runs those that are not in the cache are made when a request names them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve.server.options import ServerOptions
from tests.conftest import MODELS, randomize
from tests.server.attacks import head
from tests.server.conftest import BASE, Server, started

COUNT = 66
PROMPT = "count : nine"
FILE = "adapter_model.safetensors"
# What a process that adds a run imports, and then what it did not.
IMPORTS = """
import sys
import converters.targets.onnx.add, dora_serve.server.prepare.make
from dora_serve.server.prepare.lighter import without_compiler, without_unused
with without_compiler(), without_unused():
    from transformers import GenerationMixin, LlamaForCausalLM
print(*{"onnx_ir", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor"} & {*sys.modules})
import torch._dynamo
print(torch._dynamo.config.__name__, torch.distributed.is_available())
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a base and runs of which each is another multiple of the first."""
    folder = tmp_path_factory.mktemp("many")
    root = folder / "models"
    shutil.copytree(MODELS / BASE, root / BASE)
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / BASE), config)
    randomize(model)
    model.save_pretrained(root / "run-0")
    tensors = load_file(root / "run-0" / FILE)
    for number in range(1, COUNT):
        run = root / f"run-{number}"
        run.mkdir()
        shutil.copy(root / "run-0" / "adapter_config.json", run)
        scaled = {n: t * (1 + number * ("lora_B" in n)) for n, t in tensors.items()}
        save_file(scaled, run / FILE, {"format": "pt"})
    with started(root, folder) as running:
        yield running


def answer(server: Server, model: str) -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    body |= {"ignore_eos": True}
    with server.http as http:
        return http.post("/v1/completions", json=body)


def details(server: Server) -> dict[str, Any]:
    with server.http as http:
        return {model["id"]: model for model in http.get("/dora/models").json()["data"]}


def live(server: Server, name: str) -> list[float]:
    """The log-probabilities of six greedy tokens of PEFT's own model."""
    base = AutoModelForCausalLM.from_pretrained(server.root / BASE)
    model = PeftModel.from_pretrained(base, str(server.root / name)).eval()
    ids = AutoTokenizer.from_pretrained(server.root / BASE)(PROMPT, return_tensors="pt").input_ids
    found = []
    for _ in range(6):
        with torch.no_grad():
            likely = torch.log_softmax(model(ids).logits[0, -1].double(), dim=-1)
        found.append(float(likely.max()))
        ids = torch.cat([ids, likely.argmax().view(1, 1)], dim=1)
    return found


def test_a_run_is_made_when_it_is_first_asked_for(many: Server) -> None:
    before = details(many)
    assert len(before) == COUNT + 1
    told = before["run-65"]
    assert not told["loaded"] and told["bytes"] == 0
    assert {module["rank"] for module in told["modules"].values()} == {3}
    with ThreadPoolExecutor() as pool:
        asked = ["run-65", "run-1", "run-65", "run-1"]
        answers = list(pool.map(answer, [many] * 4, asked))
    assert [each.status_code for each in answers] == [200] * 4, [each.text for each in answers]
    (fifth, first, again, _) = (each.json()["choices"][0]["logprobs"] for each in answers)
    assert fifth["token_logprobs"] == pytest.approx(live(many, "run-65"), abs=1e-4)
    assert first["token_logprobs"] == pytest.approx(live(many, "run-1"), abs=1e-4)
    assert again["tokens"] == fifth["tokens"]
    assert fifth["token_logprobs"] != pytest.approx(first["token_logprobs"], abs=1e-2)
    after = details(many)
    assert {name for name in after if after[name]["loaded"]} == {BASE, "run-1", "run-65"}
    assert {**told, **{n: after["run-65"][n] for n in ("loaded", "bytes", "requests")}} == {
        **after["run-65"],
        "modules": told["modules"],
    }
    assert after["run-65"]["bytes"] > 0


def test_all_who_name_a_run_wait_for_it(many: Server) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(answer, [many] * 24, ["run-11"] * 24))
    assert [each.status_code for each in answers] == [200] * 24


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_lora_adapter"])
def test_of_clients_that_left_none_is_waited_for(many: Server, path: str) -> None:
    asks = path == "/v1/completions"
    gone = [f"run-{number}" for number in (range(20, 36) if asks else range(36, 52))]
    port = int(many.url.rpartition(":")[2])
    with ExitStack() as clients:
        for name in gone:
            wanted = {"lora_name": name, "lora_path": name, "load_inplace": True}
            body = {"model": name, "prompt": PROMPT} if asks else wanted
            content = json.dumps(body).encode()
            bare = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
            bare.sendall(head(path, f"Content-Length: {len(content)}") + content)
        time.sleep(0.5)  # until they wait
    while (asked := answer(many, "run-12" if asks else "run-13")).status_code == 429:
        time.sleep(0.1)
    assert asked.status_code == 200
    after = details(many)
    assert sum(after[name]["bytes"] > 0 for name in gone) < len(gone) / 2


def test_one_that_cannot_be_made_any_more_is_refused_alone(many: Server) -> None:
    shutil.rmtree(many.root / "run-7")
    config = many.root / "run-8" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))
    for name in ("run-7", "run-8"):
        refused = answer(many, name)
        assert refused.status_code == 503
        assert name in refused.json()["error"]["message"]
        assert str(many.root) not in refused.text
    assert answer(many, "run-1").status_code == 200


def test_it_can_be_taken_away_and_put_in_place_before(many: Server) -> None:
    with many.http as http:
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "run-9"}).status_code == 200
        assert answer(many, "run-9").status_code == 404
        load: dict[str, object] = {"lora_name": "run-10", "lora_path": "run-65"}
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 400
        load["load_inplace"] = True
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert answer(many, "run-10").json()["choices"] == answer(many, "run-65").json()["choices"]


def test_one_that_cannot_be_made_is_tried_once_for_all_who_wait(many: Server) -> None:
    shutil.rmtree(many.root / "run-14")
    server, tries = psutil.Process(many.process.pid), set[int]()
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(answer, many, "run-14") for _ in range(16)]
        while not all(each.done() for each in asked):
            tries |= {child.pid for child in server.children() if _prepares(child)}
            time.sleep(0.005)
    assert {each.result().status_code for each in asked} == {503}
    assert 1 <= len(tries) <= 5  # who asks once it has ended tries anew


def _prepares(process: psutil.Process) -> bool:
    try:
        return "dora_serve.server.prepare.make" in process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return False


def test_what_adds_a_run_beside_others_is_light() -> None:
    """Nothing of torch's compiler or of what builds graphs; afterwards it is there for who asks."""
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "torch._dynamo.config True"]


def test_nobody_waits_longer_than_for_an_answer(many: Server) -> None:
    for number in range(COUNT, COUNT + 6):  # in place of those that are gone
        shutil.copytree(many.root / "run-1", many.root / f"run-{number}")
    options = ServerOptions(threads=1, timeout=0.3)
    with started(many.root, many.root.parent, None, options) as hasty:
        begin = time.monotonic()
        late = answer(hasty, "run-60")
        assert late.status_code == 504 and "run-60" not in late.text
        assert time.monotonic() - begin < 3
        while answer(hasty, "run-60").status_code == 504:
            assert time.monotonic() - begin < 60
            time.sleep(0.5)
        assert answer(hasty, "run-60").status_code == 200
