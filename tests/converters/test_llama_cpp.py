"""Our GGUF adapters in llama.cpp itself, where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from converters.targets.gguf.adapter import permute
from dora_serve import read_run, write_adapter
from dora_serve.proof.verify import logits
from tests.conftest import randomize
from tests.converters.test_gguf import FAMILIES, make

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

TOKENS = [1, 7, 22, 5, 31, 64, 9, 40, 2, 3, 70, 12]
TOLERANCE = 1e-5  # everything in float32, the cache of keys and values too


def write_base(base: Path, family: str, out: Path) -> None:
    """The base as `convert_hf_to_gguf.py` writes it, float32, without a vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config, architecture = model.config, FAMILIES[family][1]
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(getattr(config, "n_positions", 64))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        kind = name.split(".")[-2]
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
            tensor = tensor.T
        heads = {"q_proj": config.num_attention_heads}
        heads["k_proj"] = getattr(config, "num_key_value_heads", 0)
        if FAMILIES[family][3] and kind in heads:
            tensor = permute(tensor, heads[kind])
        writer.add_tensor(
            table.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """Logits of TOKENS, `[tokens, vocab]`, through llama.cpp's C interface."""
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), params)
    assert model
    context_params: Any = llama_cpp.llama_context_default_params()
    context_params.n_ctx, context_params.n_threads = 32, 1
    context_params.flash_attn_type = 0
    context_params.type_k = context_params.type_v = 0  # float32 cache
    context = llama_cpp.llama_init_from_model(model, context_params)
    if adapter is not None:
        lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        assert lora
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
        assert (
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        )
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for position, token in enumerate(TOKENS):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = True
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = llama_cpp.llama_get_logits(context)
    values = np.ctypeslib.as_array(rows, shape=(len(TOKENS), 80)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(values)


def _round_activations(model: Any) -> None:
    """GELU of float16 in float16: llama.cpp looks it up in a table (`GGML_GELU_FP16`)."""
    for module in model.modules():
        if type(module).__name__ == "NewGELUActivation":
            module.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
            module.register_forward_hook(lambda _, __, output: output.half().float())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_llama_cpp_computes_what_peft_computes(tmp_path: Path, family: str) -> None:
    base, lora = make(family, tmp_path)
    write_base(base, family, tmp_path / "base.gguf")
    write_adapter(read_run(lora), tmp_path / "out", base=base, target="gguf")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(lora)).eval()
    if family == "gpt2":
        _round_activations(live)
    inputs = {"input_ids": torch.tensor([TOKENS]), "attention_mask": torch.ones(1, len(TOKENS))}
    truth = logits(live, inputs)[0]
    found = llama_logits(tmp_path / "base.gguf", tmp_path / "out" / "out.gguf")
    without = llama_logits(tmp_path / "base.gguf", None)
    assert float((found - truth).abs().max()) <= TOLERANCE
    assert torch.equal(found.argmax(-1), truth.argmax(-1))
    assert float((without - truth).abs().max()) > 10 * TOLERANCE


def test_llama_cpp_adapts_embedding_and_head(tmp_path: Path) -> None:
    base, _ = make("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"])
    )
    randomize(peft)
    peft.save_pretrained(tmp_path / "ends")
    write_base(base, "llama", tmp_path / "base.gguf")
    write_adapter(read_run(tmp_path / "ends"), tmp_path / "out", base=base, target="gguf")
    inputs = {"input_ids": torch.tensor([TOKENS]), "attention_mask": torch.ones(1, len(TOKENS))}
    truth = logits(peft.eval(), inputs)[0]
    found = llama_logits(tmp_path / "base.gguf", tmp_path / "out" / "out.gguf")
    assert float((found - truth).abs().max()) <= TOLERANCE
    assert torch.equal(found.argmax(-1), truth.argmax(-1))
