"""What `plan` counts for a slot is what vLLM allocates for one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from converters.model.base import open_base
from dora_serve.vllm.fleet import Pool
from tests.converters.families import save_base

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

RANK = 8
GROUPED = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def allocated(model: Any) -> int:
    """Bytes of the A and B of one slot, everywhere in vLLM's model."""
    stacks = [
        getattr(module, name, None)
        for module in model.modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
    ]
    tensors = [t for s in stacks if s is not None for t in (s if isinstance(s, tuple) else [s])]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama", ["up_proj", "lm_head"]),
        ("llama", None),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
    ],
)
def test_a_slot_takes_what_vllm_allocates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, targets: list[str] | None
) -> None:
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    save_base(family, tmp_path, False, **GROUPED)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        max_model_len=32,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=1,
        lora_target_modules=targets,
    )
    (found,) = llm.apply_model(allocated)
    llm.llm_engine.engine_core.shutdown()
    pool = Pool("base", open_base(tmp_path), "causal-lm", {})
    assert pool.slot_bytes(RANK, targets) == found
