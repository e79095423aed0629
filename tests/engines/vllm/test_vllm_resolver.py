"""Runs and adapters that come, change and go while the server runs: the resolver, and `watch`."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import DATA, MODELS, randomize
from tests.engines.vllm.servers import BASE, DORA_SERVE, KEY, ask, client, live_tokens, wait_until

pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("up")

PROMPT = "count : nine"
Change = Callable[[], object]


def lora(base: Path, out: Path, rank: int, **config: object) -> Path:
    """A PEFT adapter of visible effect, another for another rank."""
    targets = ["q_proj", "v_proj", "up_proj"]
    settings = {"r": rank, "lora_alpha": 4 * rank, "target_modules": targets, **config}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    randomize(model)
    model.save_pretrained(out)
    return out


def said(folder: Path, run: Path) -> list[int]:
    ids = AutoTokenizer.from_pretrained(folder / BASE)(PROMPT)["input_ids"]
    return live_tokens(run, folder / BASE, ids, 12)


def exchange(old: Path, new: Path) -> None:
    """Put `new` in the place of `old` as a training script does: one rename after another."""
    shutil.copytree(new, old.with_name("new"))
    old.rename(old.with_name("old"))
    old.with_name("new").rename(old)
    shutil.rmtree(old.with_name("old"))


@contextmanager
def traffic(url: str, *models: str) -> Iterator[list[tuple[str, list[int]]]]:
    """Everybody asks all the time: the answers in order. A refusal is raised at the end."""
    answers: list[tuple[str, list[int]]] = []
    stop = threading.Event()

    def asking(model: str) -> None:
        while not stop.is_set():
            answers.append((model, ask(url, model, PROMPT)))
            time.sleep(0.05)  # the server shares its processors with whoever else is tested

    with ThreadPoolExecutor(len(models)) as pool:
        waiting = [pool.submit(asking, model) for model in models]
        try:
            yield answers
        finally:
            stop.set()
        for each in waiting:
            each.result()


def test_a_reference_checkpoint_that_no_one_exported(folder: Path, url: str) -> None:
    shutil.copytree(MODELS / "runs", folder / "later" / "runs")
    run = "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Every_Second/Tiny_Llama--Every_Second--1"
    assert ask(url, f"later/{run}", PROMPT) == said(folder, MODELS / run)
    assert ask(url, f"later/{run}", PROMPT) != said(
        folder, MODELS / run.replace("Every", "Count").replace("Second", "Down")
    )


def test_concurrent_first_requests_convert_once(folder: Path, url: str, cache: Path) -> None:
    run = lora(folder / BASE, folder / "later" / "crowd", 3)
    before = set(cache.glob("*/adapter_config.json"))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url, "later/crowd", PROMPT), range(8)))
    assert answers == [said(folder, run)] * 8
    assert len(set(cache.glob("*/adapter_config.json")) - before) == 1


def refused(url: str, name: str, kind: type[openai.APIStatusError]) -> str:
    with pytest.raises(kind) as error:
        ask(url, name, PROMPT)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["nothing", "../served", "/etc", "later/../../x", "a\0b", "x" * 5000, "later"]
)
def test_names_never_leave_the_folder(url: str, name: str, folder: Path) -> None:
    outside = folder.parent / "x"
    if not outside.exists():
        lora(folder / BASE, outside, 2)
    assert "does not exist" in refused(url, name, openai.NotFoundError)


def test_what_cannot_be_served_is_refused_with_the_reason(folder: Path, url: str) -> None:
    later = folder / "later"
    assert "max-lora-rank" in refused_rank(folder, url, later / "high")
    shutil.copytree(DATA / "reference" / "runs", later / "other")
    (run,) = (later / "other" / "Checkpoint" / "Tiny_Llama_32").rglob("*Xsum--1*")
    told = refused(url, str(run.relative_to(folder)), openai.BadRequestError)
    assert "base" in told
    stranger = lora(folder / BASE, later / "stranger", 2) / "adapter_config.json"
    said = {**json.loads(stranger.read_text()), "base_model_name_or_path": "org/other"}
    stranger.write_text(json.dumps(said))
    told = refused(url, "later/stranger", openai.BadRequestError)
    assert "the run names org/other" in told
    broken = lora(folder / BASE, later / "broken", 2)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    told = refused(url, "later/broken", openai.BadRequestError)
    assert "file: adapter_model.safetensors" in told
    assert str(folder) not in told


def refused_rank(folder: Path, url: str, run: Path) -> str:
    lora(folder / BASE, run, 24)
    return refused(url, str(run.relative_to(folder)), openai.BadRequestError)


def test_a_changed_run_is_picked_up_and_no_request_is_lost(folder: Path, url: str) -> None:
    first = lora(folder / BASE, folder.parent / "first", 4)
    second = lora(folder / BASE, folder.parent / "second", 6)
    old, new = said(folder, first), said(folder, second)
    assert old != new
    name, run = "later/changing", folder / "later" / "changing"
    shutil.copytree(first, run)
    assert ask(url, name, PROMPT) == old
    with traffic(url, name, name, BASE) as answers:
        exchange(run, second)
        wait_until(lambda: (name, new) in answers)
    told = Counter((model, tuple(tokens)) for model, tokens in answers)
    assert set(told) <= {(name, tuple(old)), (name, tuple(new)), (BASE, tuple(base_said(url)))}
    assert ask(url, name, PROMPT) == new
    shutil.rmtree(run)
    wait_until(lambda: name not in names(url))
    refused(url, name, openai.NotFoundError)


def base_said(url: str) -> list[int]:
    return ask(url, BASE, PROMPT)


def names(url: str) -> set[str]:
    return {model.id for model in client(url).models.list()}


def test_watch_makes_the_server_follow_a_folder(
    folder: Path, url: str, tmp_path: Path, cache: Path
) -> None:
    first = lora(folder / BASE, tmp_path / "first", 2)
    second = lora(folder / BASE, tmp_path / "second", 5)
    old, new = said(folder, first), said(folder, second)
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    words = [DORA_SERVE, "watch", wanted, "--server", url, "--base", folder / BASE]
    env = {"DORA_SERVE_CACHE": str(cache), "DORA_SERVE_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
    kept = names(url)
    log, told = tmp_path / "log", tmp_path / "told"

    def done() -> list[str]:
        return [line.split()[1] for line in told.read_text().splitlines() if "watched" in line]

    with log.open("w") as stderr, told.open("w") as stdout:
        watching = subprocess.Popen(
            [*map(str, words), "--interval", "0.3", "--keep"],
            env=env,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        with traffic(url, BASE, BASE) as answers:
            shutil.copytree(first, wanted / "watched")
            wait_until(lambda: "watched" in names(url))
            assert ask(url, "watched", PROMPT) == old
            exchange(wanted / "watched", second)
            wait_until(lambda: ask(url, "watched", PROMPT) == new)
            weights = wanted / "watched" / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])  # as while it is written
            wait_until(lambda: "left out: watched: file size" in log.read_text())
            assert ask(url, "watched", PROMPT) == new
            shutil.rmtree(wanted / "watched")
            wait_until(lambda: "watched" not in names(url))
            wait_until(lambda: done() == ["loaded", "reloaded", "unloaded"])
    finally:
        watching.terminate()
        watching.wait()
    assert {tuple(tokens) for _, tokens in answers} == {tuple(base_said(url))}
    assert kept == names(url), "what others loaded stays"


def test_watch_once_says_what_failed(folder: Path, url: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "wanted").mkdir()
    lora(folder / BASE, tmp_path / "wanted" / "high", 24)
    words = [DORA_SERVE, "watch", tmp_path / "wanted", "--base", folder / BASE, "--once"]
    env = {"DORA_SERVE_CACHE": str(cache), "DORA_SERVE_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
    for server, reason in ((url, "max_lora_rank"), ("http://127.0.0.1:9", "does not answer")):
        command = [*map(str, words), "--server", server]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 1
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
