"""What `plan` counts for a slot is what vLLM allocates for one, and vLLM reads what it prints."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from converters.model.base import open_base
from dora_serve.vllm.command import find_vllm_or_name
from dora_serve.vllm.fleet import Pool
from tests.converters.families import save_adapter, save_base
from tests.engines.vllm.servers import DORA_SERVE

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


NAMES = ["a=b", "x,y", "-lead", "--max-loras", "plain", "模 型", '"{']


def test_vllm_reads_the_command_and_the_yaml(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    base, root = tmp_path / "base", tmp_path / "runs"
    cls = save_base("llama", base, False, **GROUPED)
    for name in NAMES:
        save_adapter(cls, base, root / name, target_modules=["q_proj"])
    words = [DORA_SERVE, "plan", root, "--base", base, "--convert"]
    env = {**os.environ, "DORA_SERVE_CACHE": str(tmp_path / "cache")}
    command = [*map(str, words), "--yaml", str(tmp_path / "plan.yaml")]
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    program = find_vllm_or_name()
    start = printed.rindex("\n", 0, printed.index(" ".join(program[1:]))) + 1
    pasted = printed[start : printed.index("\n\n", start)]
    said = subprocess.run(["sh", "-c", f"printf '%s\\0' {pasted}"], capture_output=True, check=True)
    ran = said.stdout.decode().split("\0")[:-1]
    parser = make_arg_parser(FlexibleArgumentParser())
    for arguments in (ran[len(program) :], ["--config", str(tmp_path / "plan.yaml")]):
        read = parser.parse_args(arguments)
        assert sorted(module.name for module in read.lora_modules) == sorted(NAMES)
        assert all((Path(m.path) / "adapter_config.json").is_file() for m in read.lora_modules)
        assert read.lora_target_modules == ["q_proj"]
        assert (read.model_tag or read.model, read.served_model_name) == (str(base), ["base"])
