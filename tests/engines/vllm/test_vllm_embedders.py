"""Adapters on encoders in vLLM, for vectors; the truth is PEFT's live model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from converters.model.base import open_base
from dora_serve import read_run, write_adapter
from dora_serve.folder.inventory import discover
from dora_serve.vllm.fleet import plan_fleet
from tests.conftest import randomize

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

BOUND = 1e-5
ROWS = [[2, 7, 9, 11, 3], [2, 15, 6, 3], [2, *range(5, 25), 3]]
# Class → its configuration, and what is adapted.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Bert": ({}, ["query", "value", "output.dense"]),
    "Roberta": ({"pad_token_id": 1}, ["query", "key", "intermediate.dense"]),
    # vLLM asks for what transformers 4 wrote, as the published models have it.
    "XLMRoberta": ({"pad_token_id": 1, "position_embedding_type": "absolute"}, ["value"]),
    "ModernBert": (
        {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 2},
        ["Wqkv", "Wo", "Wi"],
    ),
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(26))]


def made(folder: Path, family: str) -> Any:
    """The live model; base and run are in `folder`."""
    more, targets = FAMILIES[family]
    sizes = {"vocab_size": 30, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **more})
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder / "base")
    (folder / "base" / "vocab.txt").write_text("\n".join(VOCABULARY))
    words = transformers.BertTokenizer.from_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    base = getattr(transformers, f"{family}Model").from_pretrained(folder / "base")
    told = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="FEATURE_EXTRACTION")
    live: Any = get_peft_model(base, told)
    randomize(live)
    live.eval().save_pretrained(folder / "run")
    return live


def ask(folder: Path, options: dict[str, Any]) -> list[list[list[float]]]:
    """The vectors of all rows with the adapter and without, as vLLM makes them."""
    from vllm import LLM, TokensPrompt
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "base"),
        runner="pooling",
        dtype="float32",
        max_model_len=40,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        distributed_executor_backend="uni",
        enable_lora=True,
        **options,
    )
    prompts = [TokensPrompt(prompt_token_ids=row) for row in ROWS]
    requests = LoRARequest("adapter", 1, str(folder / "adapter")), None
    told = [llm.embed(prompts, lora_request=request, use_tqdm=False) for request in requests]
    llm.llm_engine.engine_core.shutdown()
    return [[each.outputs.embedding for each in vectors] for vectors in told]


@pytest.mark.parametrize(
    "family", ["Bert", *(pytest.param(n, marks=pytest.mark.further) for n in [*FAMILIES][1:])]
)
def test_vectors_are_those_of_pefts_live_model(family: str, tmp_path: Path) -> None:
    live = made(tmp_path, family)
    write_adapter(
        read_run(tmp_path / "run"), tmp_path / "adapter", base=tmp_path / "base", target="vllm"
    )
    (pool,) = plan_fleet(discover(tmp_path, str(tmp_path / "base"))).pools
    assert {"run", "adapter"} <= pool.ranks.keys()
    options = {"max_lora_rank": pool.max_lora_rank, "lora_target_modules": pool.target_modules}
    tuned, plain = ask(tmp_path, options)
    for row, found, without in zip(ROWS, tuned, plain, strict=True):
        with torch.inference_mode():
            truth = live(input_ids=torch.tensor([row])).last_hidden_state[0, 0]
            with live.disable_adapter():
                base = live(input_ids=torch.tensor([row])).last_hidden_state[0, 0]
        for vector, state, other in ((found, truth, base), (without, base, truth)):
            unit = torch.nn.functional.normalize(state, dim=0)
            assert (torch.tensor(vector) - unit).abs().max() <= BOUND
            wrong = torch.nn.functional.normalize(other, dim=0)
            assert (torch.tensor(vector) - wrong).abs().max() > 100 * BOUND  # the control
    assert open_base(tmp_path / "base").task == pool.task == "feature-extraction"
