"""The proof's truth, bound, prompts and verdicts, each with a planted fault beside it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import BaseError
from converters.model.base import open_base
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter, write_onnx
from dora_serve.commands.verify import command
from dora_serve.proof import prompts
from dora_serve.proof.verify import NOISE, TOLERANCE, Verification
from tests.conftest import MODELS, randomize
from tests.converters.families import save_base

Tensors = dict[str, torch.Tensor]
EMBEDDING = "model.embed_tokens.weight"


def adapted(model: Any, out: Path, **config: Any) -> Any:
    """PEFT's live model with random values in what it trains, saved to `out`."""
    peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6, **config}))
    randomize(peft, ("lora_", "modules_to_save", "trainable_tokens_delta"))
    peft.eval().save_pretrained(out)
    return peft


def edited(artifact: Path, out: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a merged model with other tensors and another configuration."""
    shutil.copytree(artifact, out)
    tensors = change(load_file(out / "model.safetensors"))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", {"format": "pt"})
    known = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**known, **config}))
    return out


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base whose logits are as large as a real model's, a run, and its merge."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.15,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight *= 12
    model.save_pretrained(folder / "base")
    more = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted(transformers.LlamaForCausalLM.from_pretrained(folder / "base"), folder / "run", **more)
    merge(read_run(folder / "run"), folder / "merged", base=folder / "base")
    return folder


def test_a_correct_merge_of_large_logits_is_within_the_noise(large: Path) -> None:
    found = verify(read_run(large / "run"), large / "merged", large / "base")
    assert found.passed and found.truth == "peft" and found.noise_of == "float64"
    assert found.tolerance == NOISE * found.noise > TOLERANCE
    assert found.control > 100 * found.tolerance


def halved(base: Path) -> Callable[[Tensors], Tensors]:
    own = load_file(base / "model.safetensors")
    return lambda tensors: {name: (t + own[name]) / 2 for name, t in tensors.items()}


def with_head(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    other = 1 + 0.05 * torch.randn(tensors[EMBEDDING].shape[0], 1, generator=generator)
    return {**tensors, "lm_head.weight": tensors[EMBEDDING] * other}


@pytest.mark.parametrize("fault", ["tie cut", "head lost", "scale halved", "another base's norms"])
def test_a_planted_fault_is_ten_times_beyond_the_bound(
    large: Path, tmp_path: Path, fault: str
) -> None:
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        "tie cut": with_head,
        "head lost": dict,
        "scale halved": halved(large / "base"),
        "another base's norms": lambda tensors: {
            name: tensor * 1.02 if "norm" in name else tensor for name, tensor in tensors.items()
        },
    }
    config = {"tie_word_embeddings": False} if fault in ("tie cut", "head lost") else {}
    wrong = edited(large / "merged", tmp_path / "wrong", changes[fault], **config)
    found = verify(read_run(large / "run"), wrong, large / "base")
    assert not found.passed
    assert found.max_abs > 10 * found.tolerance
    assert [("lm_head.weight" in reason) for reason in found.failures] == (
        [True] if fault == "head lost" else []
    )


def test_a_tied_side_trained_whole_is_judged_by_peft(tmp_path: Path) -> None:
    """A masked language model: who is tied to what was trained keeps the old values."""
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    base = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    live = adapted(
        base, tmp_path / "run", target_modules=["query"], modules_to_save=["word_embeddings"]
    )
    trained = live.base_model.model.bert.embeddings.word_embeddings.modules_to_save["default"]
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    for tied in (False, True):
        config.tie_word_embeddings = tied
        model = transformers.BertForMaskedLM(config)
        model.load_state_dict(
            transformers.BertForMaskedLM.from_pretrained(tmp_path / "base").state_dict()
        )
        for name, layer in live.named_modules():
            if name.endswith("query"):
                delta = layer.get_delta_weight("default")
                model.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
        if not tied:
            decoder = model.cls.predictions.decoder
            decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
        model.bert.embeddings.word_embeddings.weight.data.copy_(trained.weight)
        model.save_pretrained(tmp_path / f"tied-{tied}")
    right = verify(run, tmp_path / "tied-False", tmp_path / "base")
    assert right.passed, right.max_abs
    found = verify(run, tmp_path / "tied-True", tmp_path / "base")
    assert not found.passed and found.truth == "peft"
    assert found.max_abs > 10 * found.tolerance


SOUND: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 60,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 30,
            "pad_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 2,
        },
        ["q_proj", "v_proj"],
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "conv_dim": (16, 16),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 4),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        ["q_proj", "v_proj"],
    ),
}


@pytest.mark.parametrize("family", SOUND)
def test_models_of_sound_are_asked_sound(tmp_path: Path, family: str) -> None:
    name, values, targets = SOUND[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**values)).save_pretrained(tmp_path / "base")
    adapted(cls.from_pretrained(tmp_path / "base"), tmp_path / "run", target_modules=targets)
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    found = verify(run, tmp_path / "merged", tmp_path / "base")
    assert found.passed and found.asked[0].startswith("random input_")
    assert not verify(run, tmp_path / "base", tmp_path / "base").passed


def test_the_prompts_cross_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge whose configuration lost the window computes the same up to it only."""
    cls = save_base("mistral", tmp_path / "base", sliding_window=24)
    model = cls.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "run", target_modules=["q_proj"], task_type="CAUSAL_LM")
    run = read_run(tmp_path / "run")
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    wrong = edited(tmp_path / "merged", tmp_path / "wrong", dict, sliding_window=None)
    right = verify(run, tmp_path / "merged", tmp_path / "base")
    assert right.passed and "one of 35 tokens" in right.asked and not right.left
    assert not verify(run, wrong, tmp_path / "base").passed
    monkeypatch.setattr(prompts, "_OPERATIONS", 1.0)
    blind = verify(run, wrong, tmp_path / "base")
    assert blind.passed and "sliding_window 24 is not crossed" in blind.left[0]


def test_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    sample = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
    base = tmp_path / "base"
    shutil.copytree(MODELS / "tiny-llama-base", base)
    letters = [*map(chr, range(32, 127))]
    tokenizer: dict[str, Any] = json.loads((base / "tokenizer.json").read_text())
    run, vocab = read_run(sample), json.loads((base / "config.json").read_text())["vocab_size"]
    ids = {letter: i for i, letter in enumerate(["[UNK]", *letters]) if i < vocab}
    tokenizer |= {
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "normalizer": None,
        "post_processor": None,
        "added_tokens": [],
    }
    assert prompts.prompts_of(run, open_base(MODELS / "tiny-llama-base")).asked[0] != "2 texts"
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    (base / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}'
    )
    found = prompts.prompts_of(run, open_base(base))
    if vocab > len(ids):
        assert found.asked[0] == "2 texts"
        assert found.batches[0]["input_ids"][0, 0] == ids["T"]


def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path) -> None:
    """A panic of the library in Rust, of a pattern that never ends, is no `Exception`."""
    sample = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
    good, base, text = MODELS / "tiny-llama-base", tmp_path / "base", tmp_path / "text"
    merge(sample, tmp_path / "merged", base=good)
    shutil.copytree(good, base)
    pattern = {"Regex": "([a-z ]+[a-z ]+)+[0-9]"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    for folder in (base, tmp_path / "merged"):
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pre_tokenizer": split}))
    run = read_run(sample)
    assert prompts.prompts_of(run, open_base(base)).asked[0] == "4 x 16 random ids"
    assert "its tokenizer does not load" in verify(run, tmp_path / "merged", good).failures[0]
    text.write_text("x" * 60_000)
    with pytest.raises(BaseError, match="no tokenizer that reads the text"):
        write_onnx(base, tmp_path / "out", precision="int4", calibrate=text)


def test_what_does_not_load_has_failed(large: Path, tmp_path: Path) -> None:
    run = read_run(large / "run")
    key = "model.layers.0.mlp.up_proj.weight"
    lost = edited(large / "merged", tmp_path / "lost", lambda t: {n: t[n] for n in t if n != key})
    found = verify(run, lost, large / "base")
    assert not found.passed and key in found.failures[0]
    more = edited(
        large / "merged", tmp_path / "more", lambda t: {**t, "model.extra.weight": t[key] + 1}
    )
    found = verify(run, more, large / "base")
    assert not found.passed and "model.extra.weight" in found.failures[0]
    cut = edited(large / "merged", tmp_path / "cut", lambda t: {**t, key: t[key][:8]})
    for unloadable in (cut, edited(large / "merged", tmp_path / "odd", dict, architectures=["No"])):
        words = [str(large / "run"), str(unloadable), "--base", str(large / "base")]
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert "does not load" in done.output and "FAILED" in done.output
    write_adapter(run, tmp_path / "adapter", base=large / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "layers.0.mlp.up_proj" not in n}, file)
    found = verify(run, tmp_path / "adapter", large / "base")
    assert not found.passed and "up_proj" in found.failures[0]
    file.write_bytes(file.read_bytes()[:1000])
    assert "does not load" in verify(run, tmp_path / "adapter", large / "base").failures[0]


def test_rounding_is_told(large: Path, tmp_path: Path) -> None:
    run = read_run(large / "run")
    merge(run, tmp_path / "half", base=large / "base", dtype=torch.bfloat16)
    found = verify(run, tmp_path / "half", large / "base")
    assert found.passed and found.rounding is not None and found.rounding > 10 * TOLERANCE
    assert found.lost is not None and found.lost > 0
    tensors = load_file(large / "run" / "adapter_model.safetensors")
    shutil.copytree(large / "run", tmp_path / "weak")
    weak = {n: t * 0.01 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(weak, tmp_path / "weak" / "adapter_model.safetensors")
    run = read_run(tmp_path / "weak")
    merge(run, tmp_path / "lossy", base=large / "base", dtype=torch.bfloat16)
    found = verify(run, tmp_path / "lossy", large / "base")
    assert any("rounding" in warning for warning in found.warnings)


@pytest.mark.parametrize("up", [False, True])
def test_ties_may_be_rounded_either_way(large: Path, tmp_path: Path, up: bool) -> None:
    """All weights of a matrix lie on one, to which a sum in float32 may come from either side."""
    run, key = read_run(large / "run"), "model.layers.0.mlp.up_proj.weight"
    merged, own = (load_file(large / f / "model.safetensors")[key] for f in ("merged", "base"))
    below = (merged.view(torch.int32) & ~0xFFFF).view(torch.float32)
    tie = (below.view(torch.int32) | 0x8000).view(torch.float32)
    base = tmp_path / "base"
    moved = (tie.double() - merged.double() + own.double()).float()
    edited(large / "base", base, lambda tensors: {**tensors, key: moved})
    merge(run, tmp_path / "half", base=base, dtype=torch.bfloat16)
    side = (below + 2 * (tie - below) if up else below).bfloat16()
    turned = edited(tmp_path / "half", tmp_path / "turned", lambda tensors: {**tensors, key: side})
    stored = load_file(tmp_path / "half" / "model.safetensors")[key]
    assert 0.01 < float((stored != side).double().mean()) < 0.99  # as the sums happened to come
    found = verify(run, turned, base)
    assert found.passed and found.max_abs < 0.01 * found.tolerance
    beyond = side.float() + 4 * (tie - below)
    wrong = edited(turned, tmp_path / "beyond", lambda t: {**t, key: beyond.bfloat16()})
    assert not verify(run, wrong, base).passed


def test_another_rounding_is_seen(large: Path, tmp_path: Path) -> None:
    """Of one matrix of 42, whose bits were cut off."""
    run, key = read_run(large / "run"), "model.layers.0.mlp.up_proj.weight"
    merge(run, tmp_path / "half", base=large / "base", dtype=torch.bfloat16)
    whole = load_file(large / "merged" / "model.safetensors")[key]
    cut = (whole.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    wrong = edited(tmp_path / "half", tmp_path / "cut", lambda tensors: {**tensors, key: cut})
    found = verify(run, wrong, large / "base")
    assert not found.passed and found.rounding is not None
    assert found.tolerance < found.max_abs < found.rounding


RIGHT = Verification("transformers", tolerance=1.0, max_abs=1.0, top1=1.0, control=1.1)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"max_abs": 1.1}, False),
        ({"max_abs": math.nan}, False),
        ({"top1": 0.9}, False),
        ({"top1": 0.9, "top1_bound": 0.9}, True),
        ({"control": 1.0}, False),
        ({"control": 0.0, "has_update": False}, True),
        ({"failures": ("it lacks a tensor",)}, False),
    ],
)
def test_verdicts(changes: dict[str, Any], passed: bool) -> None:
    assert replace(RIGHT, **changes).passed is passed


def test_an_update_that_is_zero_everywhere_warns(large: Path, tmp_path: Path) -> None:
    tensors = load_file(large / "run" / "adapter_model.safetensors")
    shutil.copytree(large / "run", tmp_path / "zero")
    zero = {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(zero, tmp_path / "zero" / "adapter_model.safetensors")
    run = read_run(tmp_path / "zero")
    found = verify(run, large / "base", large / "base")
    assert found.passed and not found.has_update and "zero everywhere" in found.warnings[0]
    assert not verify(run, large / "merged", large / "base").passed


def test_the_truth_is_named(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that PEFT does not load as it is has ours as truth; folders may be relative."""
    shutil.copytree(large / "run", tmp_path / "bare")
    file = tmp_path / "bare" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.removeprefix("base_model.model."): t for n, t in tensors.items()}, file)
    monkeypatch.chdir(tmp_path)
    for run, truth in (("bare", "live"), (str(large / "run"), "peft")):
        words = [run, str(large / "merged"), "--base", str(large / "base"), "--json"]
        done = CliRunner().invoke(command, words)
        told = json.loads(done.output)
        assert done.exit_code == 0 and told["passed"] and told["truth"] == truth
        said = CliRunner().invoke(command, words[:-1]).stdout
        assert ("nothing else proves how it was read" in said) == (truth == "live")
