"""Tiny models, quantized, with an adapter each; and what their merges must be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.model.base import open_base
from converters.readers import ReadOptions, read_run
from dora_serve.api import merge, write_adapter
from dora_serve.proof.verify import Verification, verify
from tests.conftest import randomize, tiny_llama

from .made import WEIGHTS, delta_of

MODULES = ["q_proj", "down_proj"]


def proves(base: str) -> pytest.MarkDecorator:
    """That a test which calls `prove` proves these cells of the support matrix."""
    told = {"method": "peft_lora", "family": "llama", "base": base}
    return pytest.mark.supports(**told, targets=("merged", "peft", "vllm"))


def proving(kinds: Iterable[str], base: str, *further: str) -> list[Any]:
    """A parameter for each of `kinds` of a quantized base; `further` ones are not run always."""

    def marks(kind: str) -> list[pytest.MarkDecorator]:
        return [proves(f"{base}: {kind}"), *([pytest.mark.further] if kind in further else [])]

    return [pytest.param(kind, marks=marks(kind)) for kind in kinds]


def plain_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A Llama whose matrices are whole blocks of every format."""
    model = tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, **changes})
    model.to(dtype).save_pretrained(folder)
    return folder


def experts_base(model: str, folder: Path, **sizes: Any) -> Path:
    """A model of four experts, two of which compute a token, whose matrices are whole blocks."""
    cls = getattr(transformers, f"{model}ForCausalLM")
    common = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 80, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = cls.config_class(**common, **heads, pad_token_id=0, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    cls(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def gpt_oss_base(folder: Path, **sizes: Any) -> Path:
    """Experts as gpt-oss fuses them, not quantized yet."""
    return experts_base(
        "GptOss",
        folder,
        intermediate_size=32,
        num_local_experts=4,
        layer_types=["full_attention"],
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **sizes,
    )


def adapter(plain: Path, folder: Path, modules: list[str] | None = None, **config: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    told = LoraConfig(r=4, target_modules=modules or MODULES, task_type="CAUSAL_LM", **config)
    peft = get_peft_model(model, told)
    randomize(peft)
    peft.save_pretrained(folder)
    return folder


def packed_base(
    plain: Path, folder: Path, tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]
) -> Path:
    """`plain` with `tensors` for its own, and `said` as its quantization."""
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**said}}))
    (folder / "generation_config.json").write_text("{}")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def changed_base(base: Path, folder: Path, name: str, value: torch.Tensor) -> Path:
    """`base` with another value of the tensor `name`."""
    tensors = load_file(base / WEIGHTS)
    assert name in tensors and not torch.equal(tensors[name], value)
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_file({**tensors, name: value}, folder / WEIGHTS, {"format": "pt"})
    return folder


def prove(
    run: Path, base: Path, out: Path, truth: Mapping[str, torch.Tensor], by: str, **asked: Any
) -> Verification:
    """Assert that the merge of `run` into `base` is `truth`, the dequantized base in float32, with
    the update on it, once in float32 and once rounded to the dtype of the configuration; and that
    `verify` says so, of floats that `by` made."""
    config = json.loads((base / "config.json").read_text())
    merge(run, out / "float32", base=base, dtype="float32", **asked)
    merge(run, out / "own", base=base, **asked)
    wide, narrow = (load_file(out / kind / WEIGHTS) for kind in ("float32", "own"))
    updates = read_run(run, ReadOptions(base=base)).updates
    assert updates and wide.keys() == narrow.keys() == truth.keys()
    assert {f"{module}.weight" for module in updates} <= truth.keys()
    for name, expected in truth.items():
        module = name.removesuffix(".weight")
        if module in updates and name != module:
            exact = expected.double() + torch.from_numpy(delta_of(updates[module]))
            error = (wide[name].double() - exact).abs()
            assert bool((error <= 1e-6 * exact.norm(dim=1, keepdim=True)).all()), name
            assert not torch.equal(wide[name], expected), name
        else:
            assert torch.equal(wide[name], expected.float()), name
        assert torch.equal(narrow[name], wide[name].to(narrow[name].dtype)), name
    before = getattr(torch, config["dtype"])
    assert {tensor.dtype for tensor in narrow.values()} == {before}
    for kind, dtype in (("float32", "float32"), ("own", config["dtype"])):
        written = json.loads((out / kind / "config.json").read_text())
        assert "quantization_config" not in written and written["dtype"] == dtype
    proof = json.loads((out / "own" / "dora_export.json").read_text())
    assert proof["dequantized"]["method"] == config["quantization_config"]["quant_method"]
    assert proof["dequantized"]["tensors"] == len(truth) - len(_plain(base, truth))
    assert proof["base"]["fingerprint"].keys() == load_file(base / WEIGHTS).keys()
    loaded = read_run(run, ReadOptions(base=base))
    for kind in ("float32", "own"):
        found = verify(loaded, out / kind, base)
        assert found.passed and found.truth == "peft", found
        assert str(found.dequantized).startswith(by), found
    for target in ("peft", "vllm"):
        write_adapter(run, out / target, base=base, target=target)
        found = verify(loaded, out / target, base, "peft")
        assert found.passed and str(found.dequantized).startswith(by), found
    return found


def _plain(base: Path, truth: Mapping[str, torch.Tensor]) -> set[str]:
    """The tensors that the files hold as floats."""
    stored = load_file(base / WEIGHTS)
    wide = (torch.bfloat16, torch.float16)
    same = {n for n, t in truth.items() if n in stored and stored[n].shape == t.shape}
    return {n for n in same if stored[n].dtype in wide}


def fails_on(run: Path, merged: Path, other: Path) -> None:
    """Assert that `verify` sees that `merged` is not of the base `other`."""
    found = verify(read_run(run, ReadOptions(base=other)), merged, other)
    assert not found.passed and found.max_abs > 10 * found.tolerance, found


def floats_of(base: Path) -> dict[str, torch.Tensor]:
    """The tensors of a base as they are read here."""
    return {name: tensor.load().float() for name, tensor in open_base(base).tensors.items()}


def live_logits(base: Path, run: Path, dequantize: bool = True) -> torch.Tensor:
    """What PEFT computes on the quantized model of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if dequantize and getattr(model, "is_quantized", False):
        model.dequantize(torch.float32)
        model.float()  # what was not quantized, which transformers 5.24 leaves as it lies
    return logits(PeftModel.from_pretrained(model, run).eval())


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    )
