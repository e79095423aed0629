"""The resolver against a table of vLLM's that is slow: what is entered late is put right too."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import threading
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


@pytest.mark.parametrize("change", ["damaged", "gone"])
def test_a_name_that_vllm_enters_late_is_let_go(
    tmp_path: Path, llama_base: Path, llama_lora: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_serve.vllm import resolver as module
    from dora_serve.vllm.table import Table

    monkeypatch.setattr(module, "_INTERVAL", 0.05)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "root" / "run"
    shutil.copytree(llama_lora, run)
    table = Table()
    models: Any = SimpleNamespace(
        model_config=SimpleNamespace(model=str(llama_base), revision=None),
        base_model_paths=[],
        lora_requests={},
        engine_client=None,
    )
    table.models = models

    async def story() -> None:
        resolver = module.RunResolver(tmp_path / "root", table, any_base=True, keep=False)
        await resolver.started({})
        request = await resolver.resolve_lora(str(llama_base), "run")
        assert request is not None
        models.lora_requests["run"] = request
        await asyncio.sleep(0.2)
        assert "run" in models.lora_requests
        if change == "gone":
            shutil.rmtree(run)
        else:
            (run / "adapter_model.safetensors").write_bytes(b"")
        while "run" in models.lora_requests:
            await asyncio.sleep(0.02)
        models.lora_requests["run"] = request  # vLLM had been loading it all the while
        while "run" in models.lora_requests:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(story(), 120))


def test_a_run_that_did_not_load_at_the_start_is_followed(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a rank over the server's, which is exchanged for another later."""
    from vllm.utils.counter import AtomicCounter

    from dora_serve.vllm import resolver as module
    from dora_serve.vllm.table import Table

    cache = tmp_path / "cache"
    monkeypatch.setattr(module, "_INTERVAL", 0.05)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(cache))
    run = tmp_path / "root" / "run"
    shutil.copytree(llama_lora, run)
    loaded = []

    async def add_lora(request: Any) -> None:
        loaded.append(request.lora_path)

    table = Table()
    models: Any = SimpleNamespace(
        model_config=SimpleNamespace(model=str(llama_base), revision=None),
        base_model_paths=[],
        lora_requests={},
        lora_resolver_lock=defaultdict(asyncio.Lock),
        lora_id_counter=AtomicCounter(0),
        is_base_model=lambda _name: False,
        engine_client=SimpleNamespace(add_lora=add_lora),
    )
    table.models = models

    async def story() -> None:
        resolver = module.RunResolver(tmp_path / "root", table, any_base=True, keep=False)
        table.refuse("run", "too large")
        await resolver.started({"run": str(cache / "too large"), "of others": "/elsewhere"})
        while "run" not in models.lora_requests:
            await asyncio.sleep(0.02)
        assert table.refusal("run") is None
        assert loaded == [models.lora_requests["run"].lora_path]
        assert cache in Path(loaded[0]).parents
        (cache / "link").symlink_to(loaded[0])  # as `watch` loads it, which follows the folder too
        await table.put("run", str(cache / "link"))
        await asyncio.sleep(0.3)
        assert len(loaded) == 2

    asyncio.run(asyncio.wait_for(story(), 120))


def test_runs_that_are_being_written_hold_up_no_other(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the event loop has threads."""
    from dora_serve.vllm import desired as following
    from dora_serve.vllm import resolver as module
    from dora_serve.vllm.convert import vllm_adapter
    from dora_serve.vllm.table import Table

    threads = []

    def noted(member: Any) -> Path:
        threads.append(torch.get_num_threads())
        return vllm_adapter(member)

    monkeypatch.setattr(following, "vllm_adapter", noted)
    monkeypatch.setattr(module, "PATIENCE", math.inf)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    shutil.copytree(llama_lora, root / "run")
    written = [f"written-{number}" for number in range(2 * min(32, (os.cpu_count() or 1) + 4))]
    for name in written:
        shutil.copytree(llama_lora, root / name)
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.05):
            for name in written:
                with (root / name / "training.log").open("a") as log:
                    log.write("step\n")

    table = Table()
    table.models = SimpleNamespace(
        model_config=SimpleNamespace(model=str(llama_base), revision=None),
        base_model_paths=[],
        lora_requests={},
        engine_client=None,
    )

    async def story() -> None:
        resolver = module.RunResolver(root, table, any_base=True, keep=False)
        await resolver.started({})
        waiting = [asyncio.create_task(resolver.resolve_lora("", name)) for name in written]
        await asyncio.sleep(0.2)
        assert await resolver.resolve_lora("", "run") is not None
        assert not any(task.done() for task in waiting)
        assert await resolver.resolve_lora("", "no run") is None
        done.set()
        assert all(await asyncio.gather(*waiting))
        assert threads and set(threads) == {1}  # the cores are vLLM's

    writer = threading.Thread(target=write)
    writer.start()
    try:
        asyncio.run(asyncio.wait_for(story(), 120))
    finally:
        done.set()
        writer.join()


def test_the_base_is_that_of_the_revision_that_vllm_serves(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `vllm serve someone/tiny --revision two`: the run fits that one alone."""
    from vllm.exceptions import VLLMValidationError

    from dora_serve.vllm import resolver as module
    from dora_serve.vllm.table import Table

    hub = tmp_path / "hub" / "models--someone--tiny"
    (hub / "refs").mkdir(parents=True)
    for revision, commit in (("main", "abc"), ("two", "def")):
        (hub / "refs" / revision).write_text(commit)
    shutil.copytree(llama_base, hub / "snapshots" / "def")
    other = LlamaConfig.from_pretrained(llama_base)
    other.hidden_size *= 2
    LlamaForCausalLM(other).save_pretrained(hub / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(llama_lora, tmp_path / "root" / "run")

    async def ask(revision: str | None) -> str:
        table = Table()
        table.models = SimpleNamespace(
            model_config=SimpleNamespace(model="someone/tiny", revision=revision),
            base_model_paths=[],
            lora_requests={},
            engine_client=None,
        )
        resolver = module.RunResolver(tmp_path / "root", table, any_base=True, keep=False)
        await resolver.started({})
        request = await resolver.resolve_lora("someone/tiny", "run")
        assert request is not None
        return str(request.lora_path)

    assert Path(asyncio.run(asyncio.wait_for(ask("two"), 120))).is_dir()
    with pytest.raises(VLLMValidationError):
        asyncio.run(asyncio.wait_for(ask(None), 120))
