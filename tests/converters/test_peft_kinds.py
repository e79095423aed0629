"""What PEFT saves in unusual combinations: merge, adapter and `verify` against PEFT's own live
model of the same folder, which the base alone does not equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, RunError, TargetError
from converters.model.base import open_base
from converters.targets.merged.plan import plan_merge
from dora_serve import ReadOptions, merge, read_run, verify, write_adapter
from tests.conftest import quick, randomize
from tests.converters.families import DECODER, ENCODER
from tests.converters.naming import logits
from tests.converters.tied_families import FAMILIES

FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
BIASED = {**ENCODER, "num_labels": 3}
TIED = {**DECODER, "tie_word_embeddings": True}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
GEMMA = {**DECODER, "head_dim": 8, "max_position_embeddings": 64}


def saved(name: str, config: str, values: dict[str, Any], out: Path) -> Path:
    """A random base of the class `name`."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return out


def trained(name: str, base: Path, out: Path, rows: int | None = None, **config: Any) -> Any:
    """PEFT's model after training on `base` in the class `name`, saved in `out`; `rows`: those of
    the embedding, where it was resized."""
    model = getattr(transformers, name).from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    live = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **config))
    randomize(live, tuple(name for name, p in live.named_parameters() if p.requires_grad))
    live.save_pretrained(out)
    return live


def prove(name: str, base: Path, run: Path, truth: torch.Tensor, rows: int | None = None) -> None:
    out = run.parent
    load = getattr(transformers, name).from_pretrained
    plain = load(base)
    if rows is not None:
        plain.resize_token_embeddings(rows, mean_resizing=False)
    assert float((logits(plain) - truth).abs().max()) > 1e-2
    read = read_run(run, ReadOptions(base=base))
    merge(read, out / "merged", base=base)
    assert float((logits(load(out / "merged")) - truth).abs().max()) < 1e-5
    write_adapter(read, out / "adapter", base=base)
    again = PeftModel.from_pretrained(plain, str(out / "adapter"))
    assert float((logits(again) - truth).abs().max()) < 1e-5
    for artifact in ("merged", "adapter"):
        found = verify(read, out / artifact, base=base)
        assert found.passed and found.truth == "peft"


HEAD = "LlamaForCausalLM"
BIAS: dict[str, Any] = {"bias": "all"}
PISSA: dict[str, Any] = {"init_lora_weights": "pissa"}
# class trained, its configuration, values, class saved as the base, the run
KINDS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "parameter, tied embedding": (
        HEAD,
        "LlamaConfig",
        TIED,
        HEAD,
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    ),
    "parameter, tied decoder": (
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        "BertForMaskedLM",
        {"target_modules": ["query"], "target_parameters": ["decoder.weight"]},
    ),
    "parameter, tied embedding, beside the whole head": (
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        "BertForMaskedLM",
        {
            "target_modules": ["query"],
            "target_parameters": ["word_embeddings.weight"],
            "modules_to_save": ["cls"],
        },
    ),
    "all of a head but its tied weight": (
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        "BertForMaskedLM",
        {"target_modules": ["query"], "modules_to_save": ["transform"], **BIAS},
    ),
    "biases beside a whole norm": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True, **BIAS},
    ),
    "biases beside a head": (
        "BertForSequenceClassification",
        "BertConfig",
        BIASED,
        "BertForSequenceClassification",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", **BIAS},
    ),
    "biases beside a head of two layers": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BIASED,
        "RobertaForSequenceClassification",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", **BIAS},
    ),
    "biases of a tied head": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
        "DistilBertForMaskedLM",
        {"target_modules": ["q_lin"], "modules_to_save": ["vocab_layer_norm"], **BIAS},
    ),
    "principal components": (
        HEAD,
        "LlamaConfig",
        DECODER,
        HEAD,
        {"target_modules": ["q_proj", "down_proj", "lm_head"], **PISSA, "use_rslora": True},
    ),
    "principal components of a Conv1D": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, **PISSA},
    ),
    "an orthogonal start": (
        HEAD,
        "LlamaConfig",
        TIED,
        HEAD,
        {"target_modules": ["up_proj", "embed_tokens"], "init_lora_weights": "olora", **BIAS},
    ),
    "an encoder of a masked language model": (  # which has no pooling layer
        "BertModel",
        "BertConfig",
        ENCODER,
        "BertForMaskedLM",
        {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"},
    ),
    "a text model's body": (
        "Gemma3TextModel",
        "Gemma3TextConfig",
        GEMMA,
        "Gemma3ForCausalLM",
        {"target_modules": ["q_proj", "up_proj"], "task_type": "FEATURE_EXTRACTION"},
    ),
    "a text model's classes": (
        "Gemma3TextForSequenceClassification",
        "Gemma3TextConfig",
        {**GEMMA, "pad_token_id": 0},
        "Gemma3ForCausalLM",
        {"target_modules": ["q_proj", "up_proj"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize(
    "kind",
    quick(
        KINDS,
        *("parameter, tied decoder", "all of a head but its tied weight"),
        *("biases of a tied head", "principal components of a Conv1D", "a text model's body"),
    ),
)
def test_what_is_written_equals_pefts_live_model(tmp_path: Path, kind: str) -> None:
    name, config, values, own, run = KINDS[kind]
    base = saved(own, config, values, tmp_path / "base")
    truth = logits(trained(name, base, tmp_path / "run", **run))
    prove(name, base, tmp_path / "run", truth)


def test_a_resized_embedding_trained_whole(tmp_path: Path) -> None:
    base = saved("GPT2LMHeadModel", "GPT2Config", GPT2, tmp_path / "base")
    run: dict[str, Any] = {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}
    live = trained("GPT2LMHeadModel", base, tmp_path / "run", 70, fan_in_fan_out=True, **run)
    prove("GPT2LMHeadModel", base, tmp_path / "run", logits(live), rows=70)


@pytest.mark.parametrize(
    "run",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_parameters": ["embed_tokens.weight"]},
        PISSA,
    ],
    ids=str,
)
def test_the_same_under_other_names(tmp_path: Path, run: dict[str, Any]) -> None:
    """A side trained whole is a copy of its own, whatever the file calls it: the other side keeps
    its values."""
    base = saved(HEAD, "LlamaConfig", TIED, tmp_path / "base")
    truth = logits(trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"], **run))
    file = tmp_path / "run" / FILE
    twice = {key.replace(PREFIX, f"{PREFIX}model."): t for key, t in load_file(file).items()}
    save_file(twice, file, {"format": "pt"})
    read = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(read, tmp_path / "merged", base=base)
    load = transformers.LlamaForCausalLM.from_pretrained
    assert float((logits(load(tmp_path / "merged")) - truth).abs().max()) < 1e-5
    write_adapter(read, tmp_path / "adapter", base=base)
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    assert float((logits(again) - truth).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "trained_too",
    [
        {"trainable_token_indices": {"embed_tokens": [5, 9]}},
        {"modules_to_save": ["lm_head"], **BIAS},
    ],
    ids=str,
)
def test_the_text_model_alone_of_a_base_that_sees(
    tmp_path: Path, trained_too: dict[str, Any]
) -> None:
    """Its class has other names than the whole one's, and none of the tower's biases."""
    whole = FAMILIES["qwen3.5, sees"]
    base = saved(whole.model, whole.config, whole.values, tmp_path / "base")
    name = "Qwen3_5ForCausalLM"
    live = trained(name, base, tmp_path / "run", target_modules=["q_proj"], **trained_too)
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    load = transformers.Qwen3_5ForConditionalGeneration.from_pretrained
    assert float((logits(load(tmp_path / "merged")) - logits(live)).abs().max()) < 1e-5
    assert float((logits(load(base)) - logits(live)).abs().max()) > 1e-2
    found = verify(run, tmp_path / "merged", base=base)
    assert found.passed
    assert found.truth == "peft"


def test_a_bias_of_its_own_on_a_layer_without_one(tmp_path: Path) -> None:
    base = saved(HEAD, "LlamaConfig", TIED, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"], lora_bias=True)
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    for write in (merge, write_adapter):
        with pytest.raises(BaseError, match="has none in the base") as error:
            write(run, tmp_path / "out", base=base)
        assert "PeftModel" in str(error.value.remedy)


def test_a_bias_of_its_own_on_a_layer_with_one(tmp_path: Path) -> None:
    name = "Qwen2ForCausalLM"
    base = saved(name, "Qwen2Config", DECODER, tmp_path / "base")
    live = trained(name, base, tmp_path / "run", target_modules=["q_proj"], lora_bias=True)
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    merged = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((logits(merged) - logits(live)).abs().max()) < 1e-5
    with pytest.raises(TargetError, match="cannot carry") as error:
        write_adapter(run, tmp_path / "out", base=base)
    assert error.value.remedy == "merge it (`merge`)"
    assert "[]" not in str(error.value.expected)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "roughly": (DECODER, {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}),
    "a tied head": (TIED, {"target_modules": ["q_proj", "lm_head"], **PISSA}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_loading_does_not_repeat_for_this_weight_alone(
    tmp_path: Path, case: str
) -> None:
    values, run = REFUSED[case]
    base = saved(HEAD, "LlamaConfig", values, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", **run)
    with pytest.raises(RunError, match="changed the base weights") as error:
        read_run(tmp_path / "run", ReadOptions(base=base))
    assert "path_initial_model_for_weight_conversion" in str(error.value.remedy)


@pytest.mark.parametrize("copy", ["pissa_init", "pissa_backup"])
def test_a_copy_that_does_not_say_how_it_began(copy: str, tmp_path: Path) -> None:
    """LLaMA-Factory's `pissa_convert` saves these below the run, as if they had begun plainly."""
    base = saved(HEAD, "LlamaConfig", DECODER, tmp_path / "base")
    trained(
        HEAD, base, tmp_path / "run", target_modules=["q_proj"], init_lora_weights="pissa_niter_4"
    )
    for name in (copy, "pissa_converted"):
        trained(HEAD, base, tmp_path / "run" / name, target_modules=["q_proj"])
    options = ReadOptions(base=base)
    for refused in (tmp_path / "run" / copy, tmp_path / "run"):
        with pytest.raises(RunError, match="changed the base weights") as error:
            read_run(refused, options)
        assert "pissa_converted" in str(error.value.remedy)
    assert read_run(tmp_path / "run" / "pissa_converted", options).updates


@pytest.mark.parametrize("began", ["lora-ga", "pissa_niter_4"])
def test_what_ms_swift_leaves_of_a_start_that_changed_the_base(began: str, tmp_path: Path) -> None:
    """LoRA-GA by the name that PEFT does not have, and the copy of the begin beside."""
    base = saved(HEAD, "LlamaConfig", DECODER, tmp_path / "base")
    run, first = tmp_path / "out/checkpoint-9", tmp_path / "out/initial_model"
    for folder in (run, first, run / "converted/default"):
        trained(HEAD, base, folder, target_modules=["q_proj"])
    assert read_run(first).updates  # somebody else's, as far as anybody can tell
    renote(run, began)
    for refused in (run, first):
        with pytest.raises(RunError, match="changed the base weights") as error:
            read_run(refused, ReadOptions(base=base))
        assert error.value.found == f"init_lora_weights: {began}"
    with pytest.raises(RunError) as error:
        read_run(run, ReadOptions(base=base))
    assert "converted/default" in str(error.value.remedy)
    assert read_run(run / "converted/default").updates


def renote(run: Path, began: object) -> None:
    path = run / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "init_lora_weights": began}))


def test_a_start_that_peft_does_not_know(tmp_path: Path) -> None:
    """Forks of PEFT have some that change the base (MiLoRA, LoRA-Null)."""
    base = saved(HEAD, "LlamaConfig", DECODER, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"])
    for known in (False, None, "gaussian", "eva", "orthogonal", "mica"):
        renote(tmp_path / "run", known)
        assert read_run(tmp_path / "run").updates
    renote(tmp_path / "run", "milora")
    with pytest.raises(RunError, match="PEFT does not know"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("factor", [None, 4.0])
def test_settings_that_were_changed_for_training_are_told(
    factor: float | None, tmp_path: Path
) -> None:
    """axolotl saves the live model's configuration beside the adapter."""
    base = saved(HEAD, "LlamaConfig", DECODER, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"])
    config = transformers.AutoConfig.from_pretrained(base)
    config.eos_token_id, config.dtype = 5, "bfloat16"
    if factor is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    told = plan_merge(run, open_base(base), None).warnings
    assert ["rope_parameters" in text for text in told] == ([] if factor is None else [True])


def test_an_adapter_that_takes_its_start_from_the_base_needs_it(tmp_path: Path) -> None:
    base = saved(HEAD, "LlamaConfig", DECODER, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"], **PISSA)
    with pytest.raises(RunError, match="without the base"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("rows", [60, 83])
def test_a_head_of_other_rows_than_the_base(tmp_path: Path, rows: int) -> None:
    """PEFT refuses it, and so do both ways."""
    base = saved(HEAD, "LlamaConfig", {**TIED, "tie_word_embeddings": False}, tmp_path / "base")
    trained(HEAD, base, tmp_path / "run", target_modules=["q_proj"], modules_to_save=["lm_head"])
    write_adapter(tmp_path / "run", tmp_path / "fits", base=base)
    tensors = load_file(tmp_path / "run" / FILE)
    head = f"{PREFIX}lm_head.weight"
    assert rows != tensors[head].shape[0]
    tensors[head] = torch.randn(rows, tensors[head].shape[1])
    save_file(tensors, tmp_path / "run" / FILE, {"format": "pt"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        PeftModel.from_pretrained(model, str(tmp_path / "run"))
    for write in (merge, write_adapter):
        with pytest.raises(BaseError, match="another shape") as caught:
            write(tmp_path / "run", tmp_path / "out", base=base)
        assert "resize_token_embeddings" in str(caught.value.remedy)
        assert not (tmp_path / "out").exists()
