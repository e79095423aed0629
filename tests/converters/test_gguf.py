"""GGUF adapters, re-read with the gguf package as llama.cpp reads them."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from converters.run import Run
from dora_serve import DoraExportError, read_run, write_adapter
from dora_serve.commands import dora_export
from tests.conftest import MODELS, randomize, tiny_llama
from tests.converters.families import DECODER

gguf = pytest.importorskip("gguf")

SPLIT = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
PHI3 = {
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
PHI = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "dense": "attn_output",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
STARCODER2 = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "c_fc": "ffn_up",
    "c_proj": "ffn_down",
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 40}

# class, llama.cpp's architecture, kinds of modules and llama.cpp's names, rows of q and k permuted
FAMILIES: dict[str, tuple[str, str, dict[str, str], bool, dict[str, Any]]] = {
    "llama": ("Llama", "llama", SPLIT, True, DECODER),
    "mistral": ("Mistral", "llama", SPLIT, True, DECODER),
    "qwen2": ("Qwen2", "qwen2", SPLIT, False, DECODER),
    "qwen3": ("Qwen3", "qwen3", SPLIT, False, {**DECODER, "head_dim": 8}),
    "gemma": ("Gemma", "gemma", SPLIT, False, {**DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2", "gemma2", SPLIT, False, {**DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3", "gemma3", SPLIT, False, {**DECODER, "head_dim": 8}),
    "phi": ("Phi", "phi2", PHI, False, DECODER),
    "phi3": ("Phi3", "phi3", PHI3, False, DECODER),
    "gpt2": ("GPT2", "gpt2", GPT2, False, GPT2_SIZES),
    "granite": ("Granite", "granite", SPLIT, True, DECODER),
    "olmo2": ("Olmo2", "olmo2", SPLIT, False, DECODER),
    "smollm3": ("SmolLM3", "smollm3", SPLIT, True, DECODER),
    "starcoder2": ("Starcoder2", "starcoder2", STARCODER2, False, DECODER),
}


def make(family: str, folder: Path) -> tuple[Path, Path]:
    """A tiny base of `family` and a PEFT adapter with another rank and alpha per kind."""
    name, _, kinds, _, sizes = FAMILIES[family]
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_class)(**sizes)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(config)
    model.save_pretrained(folder / "base")
    patterns = {kind: 2 + number for number, kind in enumerate(kinds)}
    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(kinds),
        rank_pattern=patterns,
        alpha_pattern={next(iter(kinds)): 3},
        fan_in_fan_out=name == "GPT2",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, lora)
    randomize(peft)
    peft.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


class Loaded:
    """One adapter file as `src/llama-adapter.cpp` takes it: metadata, and B·A·alpha/r by tensor."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.alpha = float(self.fields["adapter.lora.alpha"])
        self.tensors = {t.name: self._tensor(t) for t in reader.tensors}

    @staticmethod
    def _tensor(tensor: Any) -> torch.Tensor:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.tensor(values).reshape(*reversed(tensor.shape.tolist()))

    def names(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.tensors}

    def delta(self, name: str) -> torch.Tensor:
        a, b = (self.tensors[f"{name}.lora_{factor}"].double() for factor in "ab")
        return self.alpha / b.shape[1] * b @ a


def unpermute(delta: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row h·d + 2·i + j of the file is row h·d + j·d/2 + i of the Hugging Face weight."""
    out = torch.empty_like(delta)
    half = head_dim // 2
    for row in range(len(delta)):
        head, within = divmod(row, head_dim)
        out[head * head_dim + (within % 2) * half + within // 2] = delta[row]
    return out


def wanted(run: Run, module: str) -> torch.Tensor:
    update = run.updates[module].components()
    assert update is not None
    return (update.b.double() * update.c.double()) @ update.a.double()


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> bool:
    return float((found - expected).norm() / expected.norm()) <= bound


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family,
            marks=pytest.mark.supports(method="peft_lora", family=family, targets=("gguf",)),
        )
        for family in FAMILIES
    ],
)
def test_every_update_is_the_runs(tmp_path: Path, family: str) -> None:
    _, architecture, kinds, permuted, sizes = FAMILIES[family]
    base, lora = make(family, tmp_path)
    run = read_run(lora)
    write_adapter(run, tmp_path / "name", base=base, target="gguf")
    loaded = Loaded(tmp_path / "name" / "name.gguf")
    assert loaded.fields["general.type"] == "adapter"
    assert loaded.fields["adapter.type"] == "lora"
    assert loaded.fields["general.architecture"] == architecture
    assert len(run.updates) == 2 * len(kinds) == len(loaded.names())
    for module in run.updates:
        layer = next(part for part in module.split(".") if part.isdigit())
        kind = next(kind for kind in kinds if module.endswith(f".{kind}"))
        delta = loaded.delta(f"blk.{layer}.{kinds[kind]}.weight")
        expected = wanted(run, module)
        if permuted and kind in ("q_proj", "k_proj"):
            assert not close(delta, expected)
            delta = unpermute(delta, sizes["hidden_size"] // sizes["num_attention_heads"])
        assert close(delta, expected)
        assert not close(delta, expected / 2)
    assert {"README.md", "dora_export.json", "name.gguf"} == {
        path.name for path in (tmp_path / "name").iterdir()
    }


def test_embedding_and_head(tmp_path: Path, llama_base: Path) -> None:
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"])
    model = get_peft_model(tiny_llama(), lora)
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    run = read_run(tmp_path / "lora")
    write_adapter(run, tmp_path / "out", base=llama_base, target="gguf")
    loaded = Loaded(tmp_path / "out" / "out.gguf")
    assert close(loaded.delta("output.weight"), wanted(run, "lm_head"))
    a, b = (loaded.tensors[f"token_embd.weight.lora_{factor}"].double() for factor in "ab")
    assert a.shape == (80, 3) and b.shape == (32, 3)
    assert close(loaded.alpha / 3 * a @ b.T, wanted(run, "model.embed_tokens"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_is_refused(tmp_path: Path, target: str) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=[target, "q_proj"])
    )
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(DoraExportError, match=rf"tied(.|\n)*{target}"):
        write_adapter(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", target="gguf")
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused(tmp_path: Path, llama_base: Path) -> None:
    _, lora = make("llama", tmp_path)
    for file in llama_base.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["MixtralForCausalLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DoraExportError, match="MixtralForCausalLM"):
        write_adapter(lora, tmp_path / "out", base=tmp_path / "base", target="gguf")


def test_trained_tensors_are_refused(tmp_path: Path, llama_base: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), lora)
    randomize(model, ("lora_", "modules_to_save"))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(DoraExportError, match="lm_head"):
        write_adapter(tmp_path / "lora", tmp_path / "out", base=llama_base, target="gguf")


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 6e-3)])
def test_the_command_writes_narrow_dtypes(
    tmp_path: Path, llama_base: Path, llama_lora: Path, dtype: str, bound: float
) -> None:
    arguments = ["adapter", str(llama_lora), str(tmp_path / "out"), "--base", str(llama_base)]
    arguments += ["--target", "gguf", "--dtype", dtype]
    plan = CliRunner().invoke(dora_export, [*arguments, "--dry-run", "--json"])
    assert plan.exit_code == 0 and not (tmp_path / "out").exists()
    result = CliRunner().invoke(dora_export, arguments)
    assert result.exit_code == 0, result.output
    run = read_run(llama_lora)
    loaded = Loaded(tmp_path / "out" / "out.gguf")
    for layer in range(2):
        found = loaded.delta(f"blk.{layer}.ffn_up.weight")
        expected = wanted(run, f"model.layers.{layer}.mlp.up_proj")
        assert close(found, expected, bound)
        assert not close(found, expected, 1e-6)


def test_verify_says_what_to_verify_instead(
    tmp_path: Path, llama_base: Path, llama_lora: Path
) -> None:
    write_adapter(llama_lora, tmp_path / "out", base=llama_base, target="gguf")
    arguments = ["verify", str(llama_lora), str(tmp_path / "out"), "--base", str(llama_base)]
    result = CliRunner().invoke(dora_export, arguments)
    assert result.exit_code == 1
    assert "out.gguf" in result.output and "--target peft" in result.output


def test_an_update_of_zero_is_one_component_of_zeros(tmp_path: Path, llama_base: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    write_adapter(tmp_path / "lora", tmp_path / "out", base=llama_base, target="gguf")
    loaded = Loaded(tmp_path / "out" / "out.gguf")
    assert loaded.names() == {"blk.0.attn_q.weight"}
    assert not loaded.delta("blk.0.attn_q.weight").any()


def test_a_disk_that_takes_a_part_of_it(tmp_path: Path) -> None:
    """What numpy says of it has no number, as errors of the disk have."""
    runs = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8"
    run = read_run(runs / "Every_Second/Tiny_Llama--Every_Second--1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        with pytest.raises(DoraExportError, match="requested and"):
            write_adapter(run, tmp_path / "out", base=MODELS / "tiny-llama-base", target="gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
