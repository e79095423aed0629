"""Two versions of a name in one step: vLLM takes them for one, and the plugin tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dora_serve.proof.vllm import greedy
from tests.converters.families import save_adapter, save_base

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

GROUPED = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PROMPT = [7, 23, 41, 5]
COUNT = 8


class World:
    """A base in vLLM with room for two adapters, and three adapters of it."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        self.base = folder / "base"
        cls = save_base("llama", self.base, False, **GROUPED)
        self.adapters = []
        for number in range(3):
            out = folder / str(number)
            save_adapter(cls, self.base, out, target_modules=["q_proj", "up_proj", "down_proj"])
            self.adapters.append(out)
        self.llm = LLM(
            str(self.base),
            dtype="float32",
            max_model_len=32,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 27,
            distributed_executor_backend="uni",
            skip_tokenizer_init=True,
            enable_lora=True,
            max_lora_rank=8,
            max_loras=2,
            max_cpu_loras=2,
        )

    def ask(self, first: int) -> dict[str, list[int]]:
        """A request for the one version, one for the other while that is running, and a third
        adapter that takes the place of the first. `first`: the numbers of the adapters."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        engine = self.llm.llm_engine
        paths = [str(path) for path in self.adapters]
        old, new = (LoRARequest("name", first + n, paths[n]) for n in range(2))
        sampling = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
        done: dict[str, list[int]] = {}

        def steps(count: int) -> None:
            for _ in range(count):
                for output in engine.step():
                    if output.finished:
                        done[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)

        for name, version in (("old", old), ("new", new)):
            prompt = TokensPrompt(prompt_token_ids=PROMPT)
            engine.add_request(name, prompt, sampling, lora_request=version)
            steps(2)
        engine.add_lora(LoRARequest("third", first + 2, paths[2]))
        steps(2 * COUNT)
        return done

    def truth(self, number: int) -> list[int]:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.base)
        live = PeftModel.from_pretrained(model, str(self.adapters[number])).eval()
        return greedy(live, PROMPT, COUNT)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    made = World(tmp_path)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


def test_a_request_ends_with_the_weights_it_began_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    from dora_serve.vllm.table import tell_versions_apart

    old, new = world.truth(0), world.truth(1)
    assert old != new
    for name in ("__eq__", "__hash__"):
        monkeypatch.setattr(LoRARequest, name, getattr(LoRARequest, name))
    tell_versions_apart()
    assert world.ask(1) == {"old": old, "new": new}
    # The control: as vLLM compares them.
    monkeypatch.setattr(LoRARequest, "__eq__", lambda one, two: one.lora_name == two.lora_name)
    monkeypatch.setattr(LoRARequest, "__hash__", lambda one: hash(one.lora_name))
    with pytest.raises(KeyError):
        world.ask(11)
