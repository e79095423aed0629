"""Model families: a PEFT adapter on every linear layer, merged and repacked, against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.model.base import open_base
from converters.model.layout import Layout
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter, write_onnx
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import randomize, tiny_llama
from tests.converters.families import (
    DECODER,
    FAMILIES,
    MOE,
    PARAMETERS,
    further,
    prove,
    same,
    save_adapter,
    save_base,
)
from tests.reference_layout import state_dict, write_run


def cases() -> list[Any]:
    result = []
    for family, (_, _, _, both) in FAMILIES.items():
        for tied in (True, False) if both else (None,):
            name = family if tied is None else f"{family}-{'tied' if tied else 'untied'}"
            mark = pytest.mark.supports(
                method="peft_lora", family=family, targets=("merged", "peft")
            )
            result.append(pytest.param(family, tied, id=name, marks=(mark, *further(family))))
    return result


@pytest.mark.parametrize(("family", "tied"), cases())
def test_every_linear_layer(tmp_path: Path, family: str, tied: bool | None) -> None:
    base = tmp_path / "base"
    cls = save_base(family, base, tied)
    save_adapter(
        cls,
        base,
        tmp_path / "lora",
        target_modules="all-linear",
        rank_pattern={r".*\.0\..*": 2},
        # PEFT takes distilbert's pre_classifier for a head to save whole, and cannot do both.
        exclude_modules=["pre_classifier"] if family == "distilbert" else None,
        fan_in_fan_out=family == "gpt2",
        **(PARAMETERS if family in MOE else {}),
    )
    run = prove(cls, base, tmp_path / "lora", tmp_path)
    assert {2, 3} <= set(run.start_rank.values())


def fuse(base: Path) -> None:
    """Rewrite a saved model so that its files hold the names in memory, experts fused."""
    architecture = transformers.AutoConfig.from_pretrained(base).architectures[0]
    state = getattr(transformers, architecture).from_pretrained(base).state_dict()
    save_file(
        {n: t.clone() for n, t in state.items()}, base / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(family, targets, marks=further(family))
        for family, targets in (
            *((family, ["gate_up_proj", "down_proj"]) for family in sorted(MOE)),
            ("mixtral", ["down_proj"]),
            ("qwen3-moe", ["gate_up_proj"]),
        )
    ],
)
def test_experts_of_a_base_that_stores_them_fused(
    tmp_path: Path, family: str, targets: list[str]
) -> None:
    cls = save_base(family, tmp_path / "base")
    fuse(tmp_path / "base")
    lora = {"target_modules": [], "target_parameters": [f"mlp.experts.{name}" for name in targets]}
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", **lora)
    prove(cls, tmp_path / "base", tmp_path / "lora", tmp_path)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert "model.layers.0.mlp.experts.gate_up_proj" in names


def test_plain_names_are_found_without_transformers(llama_base: Path, llama_lora: Path) -> None:
    run, layout = read_run(llama_lora), Layout(open_base(llama_base), "LlamaForCausalLM")
    assert layout.on_disk(run) is run
    assert "_model" not in vars(layout)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("family", "experts", "kinds"),
    [
        ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("qwen3-moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_of_single_experts(
    tmp_path: Path, family: str, experts: str, kinds: tuple[str, ...], fused: bool
) -> None:
    """An adapter of transformers 4, where each expert was a layer; PEFT converts it to fused."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = save_base(family, base)
    shapes = {n: t.shape for n, t in load_file(base / "model.safetensors").items()}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(kinds), task_type="CAUSAL_LM")
    config.save_pretrained(lora)
    tensors = {}
    for name, shape in shapes.items():
        if f".{experts}." in name and name.split(".")[-2] in kinds:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(3, shape[1])
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 3) * 0.1
    save_file(tensors, lora / "adapter_model.safetensors")
    if fused:
        fuse(base)
    run = prove(cls, base, lora, tmp_path)
    assert len(run.updates) == 2 * 4 * 3


@pytest.mark.parametrize("prefixed", [True, False])
def test_old_names_of_layer_norms(tmp_path: Path, prefixed: bool) -> None:
    """BERT as its first files have it: gamma and beta, with and without the model's prefix."""
    base = tmp_path / "base"
    save_base("bert", base)
    state = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
        if not name.startswith("classifier")
    }
    if not prefixed:
        old = {name.removeprefix("bert."): tensor for name, tensor in old.items()}
    save_file(old, base / "model.safetensors", {"format": "pt"})
    config = transformers.BertConfig.from_pretrained(base)
    config.architectures = ["BertForMaskedLM" if prefixed else "BertModel"]
    config.save_pretrained(base)
    cls = transformers.BertForSequenceClassification
    lora = {"target_modules": ["query", "dense"], "modules_to_save": ["LayerNorm"]}
    save_adapter(cls, base, tmp_path / "lora", **lora)
    run = read_run(tmp_path / "lora")
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in run.replaced
    prove(cls, base, tmp_path / "lora", tmp_path)


def test_moved_prefixes(tmp_path: Path) -> None:
    """LLaVA: `language_model.model.` on disk, `model.language_model.` in memory."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**DECODER), image_token_index=79
    )
    torch.manual_seed(0)
    cls, base = transformers.LlavaForConditionalGeneration, tmp_path / "base"
    cls(config).save_pretrained(base)
    assert "language_model.model.norm.weight" in load_file(base / "model.safetensors")
    save_adapter(cls, base, tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    run = prove(cls, base, tmp_path / "lora", tmp_path)
    with pytest.raises(DoraExportError, match="more than text"):
        write_onnx(base, tmp_path / "onnx", run=run)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("indices", [[49, 3, 44], {"embed_tokens": [49, 3]}])
def test_single_trained_tokens(tmp_path: Path, tied: bool, indices: Any) -> None:
    cls = save_base("llama", tmp_path / "base", tied)
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", **lora)
    prove(cls, tmp_path / "base", tmp_path / "lora", tmp_path)
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.tie_word_embeddings is tied
    with pytest.raises(DoraExportError, match="`base`"):
        read_run(tmp_path / "lora")


def test_trained_tokens_of_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    """As pytorch_model.bin files hold it: with the old values it would not be tied when loaded."""
    cls = save_base("llama", tmp_path / "base", tied=True)
    model = cls.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": [49, 3]}
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", **lora)
    prove(cls, tmp_path / "base", tmp_path / "lora", tmp_path)


def test_the_embedding_of_mamba_which_its_head_is_tied_to(tmp_path: Path) -> None:
    sizes = {"vocab_size": 80, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    cls, base = transformers.MambaForCausalLM, tmp_path / "base"
    torch.manual_seed(0)
    cls(transformers.MambaConfig(**sizes)).save_pretrained(base)
    save_adapter(cls, base, tmp_path / "lora", target_modules=["embeddings", "in_proj"])
    prove(cls, base, tmp_path / "lora", tmp_path)


def test_a_translator(tmp_path: Path) -> None:
    sizes = {"vocab_size": 80, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2}
    cls, base = transformers.MarianMTModel, tmp_path / "base"
    torch.manual_seed(0)
    cls(transformers.MarianConfig(**sizes, **heads, decoder_start_token_id=0)).save_pretrained(base)
    lora = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q_proj", "v_proj", "fc1"]}
    save_adapter(cls, base, tmp_path / "lora", **lora)
    prove(cls, base, tmp_path / "lora", tmp_path)


def test_bias_inside_lora_b(tmp_path: Path) -> None:
    cls = save_base("opt", tmp_path / "base", True)
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", lora_bias=True, target_modules=["fc1"])
    run = prove(cls, tmp_path / "base", tmp_path / "lora", tmp_path, adapter=False)
    assert "model.decoder.layers.0.fc1.bias" in run.updates
    with pytest.raises(DoraExportError, match="cannot carry"):
        write_adapter(run, tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tmp_path: Path, tied: bool, targets: list[str]) -> None:
    base = tmp_path / "base"
    cls = save_base("llama", base, tied)

    def resized() -> Any:
        model = cls.from_pretrained(base)
        model.resize_token_embeddings(83)
        return model

    lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(resized(), lora)
    randomize(model, ("lora_", "embed_tokens.weight", "embed_tokens.base_layer.weight"))
    model.save_pretrained(tmp_path / "lora")
    live = PeftModel.from_pretrained(resized(), str(tmp_path / "lora")).eval()
    inputs = verification_batch(live)
    assert int(inputs["input_ids"].max()) >= 80
    truth = logits(live, inputs)
    run = read_run(tmp_path / "lora")
    merge(run, tmp_path / "merged", base=base)
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.vocab_size == 83
    same(logits(merged.eval(), inputs), truth)
    assert verify(run, tmp_path / "merged", base).passed
    write_adapter(run, tmp_path / "adapter", base=base)
    again = PeftModel.from_pretrained(resized(), str(tmp_path / "adapter")).eval()
    same(logits(again, inputs), truth)
    assert verify(run, tmp_path / "adapter", base).passed
    with pytest.raises(DoraExportError, match="cannot carry"):
        write_adapter(run, tmp_path / "vllm", base=base, target="vllm")


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(
            family, targets, marks=pytest.mark.supports(
                method="dora", family=family, targets=("merged", "peft")
            ),
        )
        for family, targets in (
            ("qwen2", ("q_proj", "v_proj", "down_proj")),
            ("phi3", ("qkv_proj", "gate_up_proj")),
            ("gemma", ("o_proj", "up_proj")),
        )
    ],
)  # fmt: skip
def test_dora_runs(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    base = tmp_path / "base"
    cls = save_base(family, base)
    run = read_run(write_run(tmp_path / "runs", state_dict(cls.from_pretrained(base), targets)))
    merge(run, tmp_path / "merged", base=base)
    write_adapter(run, tmp_path / "adapter", base=base)
    for artifact in ("merged", "adapter"):
        assert verify(run, tmp_path / artifact, base).passed


def edit_config(lora: Path, **changes: Any) -> None:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bad_adapters_on_parameters(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = save_base("qwen3-moe", base)
    save_adapter(cls, base, lora, target_modules=[], **PARAMETERS)
    with pytest.raises(DoraExportError, match="cannot carry"):
        write_adapter(lora, tmp_path / "vllm", base=base, target="vllm")
    for changes, message in (
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "cannot be told"),
        ({"target_parameters": ["experts.a", "experts.b"]}, "cannot be told"),
        ({"target_parameters": "mlp.experts.gate_up_proj"}, "not a list"),
        ({"r": 5}, "whole number of experts"),
        ({"r": 2}, "at the rank that"),
        ({"r": 6}, "at the rank that"),
        ({"target_parameters": None}, "does not name"),
    ):
        save_adapter(cls, base, lora, target_modules=[], **PARAMETERS)
        edit_config(lora, **changes)
        with pytest.raises(DoraExportError, match=message):
            merge(lora, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    save_base("qwen3-moe", tmp_path / "wide")
    save_adapter(cls, base, lora, target_modules=[], **PARAMETERS)
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(DoraExportError, match="no such module"):
        merge(lora, tmp_path / "out", base=tmp_path / "llama")


@pytest.mark.parametrize("indices", [[5], [5, 5], [5, 200], {"lm_head": [5, 6]}, 7])
def test_bad_token_indices(tmp_path: Path, indices: Any) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = save_base("llama", base, True)
    save_adapter(cls, base, lora, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    edit_config(lora, trainable_token_indices=indices)
    with pytest.raises(DoraExportError, match="trainable_token_indices"):
        merge(lora, tmp_path / "out", base=base)
