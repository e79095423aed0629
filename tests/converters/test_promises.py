"""What adapter_config.json promises, what a folder holds beside it, and what adapters must hold.

The truth is PEFT: what it refuses, or computes without what was trained, is refused here, and what
it computes is computed here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import RunError
from converters.run import NO_UPDATE
from dora_serve import ReadOptions, merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import quick, randomize, tiny_llama
from tests.dora_serve.exporting import bad, good

BOUND = 1e-6  # of the largest logit
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta", ".bias")


def base_of(out: Path, tied: bool = False, **changes: Any) -> Path:
    tiny_llama(tie_word_embeddings=tied, **changes).save_pretrained(out)
    return out


def loaded(folder: Path) -> Any:
    """The model in `folder` in its own class."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def run_of(base: Path, out: Path, words: tuple[str, ...] = TRAINED, **config: Any) -> Path:
    """A run on `base`, saved by PEFT; all that it trained has values of its own."""
    lora = LoraConfig(**{"r": 3, "lora_alpha": 48, "target_modules": ["q_proj"], **config})
    model = get_peft_model(loaded(base), lora)
    randomize(model, words)
    model.save_pretrained(out)
    return out


def drop(run: Path, word: str) -> None:
    """Take the tensors with `word` in their names out of the file of `run`."""
    tensors = load_file(run / FILE)
    kept = {name: tensor for name, tensor in tensors.items() if word not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, run / FILE, {"format": "pt"})


def edit(run: Path, **changes: Any) -> None:
    known = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps({**known, **changes}))


def live(base: Path, run: Path) -> Any:
    return PeftModel.from_pretrained(loaded(base), str(run)).eval()


def prove(base: Path, run: Path, out: Path, adapter: bool = True) -> None:
    """Merged model and adapter compute what PEFT's live model does, which the base does not."""
    model = live(base, run)
    inputs = verification_batch(model)
    truth = logits(model, inputs)
    assert float((logits(loaded(base), inputs) - truth).abs().max()) > 1e-2
    merge(run, out / "merged", base=base)
    bound = BOUND * max(1.0, float(truth.abs().max()))
    assert float((logits(loaded(out / "merged"), inputs) - truth).abs().max()) < bound
    if adapter:
        write_adapter(run, out / "adapter", base=base)
        again = logits(live(base, out / "adapter"), inputs)
        assert float((again - truth).abs().max()) < bound


LOST: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # base, run, what is taken out, what the error names
    "head": ({}, {"modules_to_save": ["lm_head"]}, "lm_head", "lm_head.weight"),
    "tied head": ({"tied": True}, {"modules_to_save": ["lm_head"]}, "lm_head", "lm_head.weight"),
    "one of two": (
        {},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        "embed_tokens",
        "embed_tokens.weight",
    ),
    "one layer": (
        {},
        {"modules_to_save": ["input_layernorm"]},
        "1.input_layernorm",
        "layers.1.input_layernorm.weight",
    ),
    "by the end of its name": (  # PEFT takes every module whose name ends so
        {},
        {"modules_to_save": ["layernorm"]},
        "post_attention",
        "post_attention_layernorm.weight",
    ),
    "tokens": ({}, {"trainable_token_indices": [3, 5]}, "trainable_tokens", "token_adapter"),
    "tokens of one side": (
        {},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 6]}},
        "lm_head",
        "lm_head.token_adapter",
    ),
    "biases": ({"attention_bias": True}, {"bias": "all"}, ".bias", "self_attn"),
    "the layers' biases": (
        {"attention_bias": True},
        {"bias": "lora_only"},
        ".bias",
        "q_proj.bias",
    ),
    "biases of the factors": ({}, {"lora_bias": True}, "lora_B.bias", "q_proj.lora_B.bias"),
    "a side that is tied": (
        {"tied": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "lm_head",
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_was_trained_and_is_not_in_the_file_is_refused(tmp_path: Path, case: str) -> None:
    changes, config, word, named = LOST[case]
    base = base_of(tmp_path / "base", **changes)
    run = run_of(base, tmp_path / "run", **config)
    whole = live(base, run)
    truth = logits(whole, verification_batch(whole))
    good("lint", run, "--base", base, "--target", "peft")
    drop(run, word)
    with pytest.raises(RunError) as error:
        merge(run, tmp_path / "merged", base=base)
    assert named in str(error.value.tensor) and error.value.remedy
    assert error.value.file == run / FILE
    assert not (tmp_path / "merged").exists()
    assert "promise" in bad("lint", run, "--base", base, "--target", "peft")
    try:  # PEFT does not load it, or computes something else than was trained
        left = live(base, run)
    except KeyError:
        return
    assert float((logits(left, verification_batch(left)) - truth).abs().max()) > 1e-3


HEADS = {
    "SequenceClassification": ("SEQ_CLS", "classifier", "classifier.out_proj"),
    "TokenClassification": ("TOKEN_CLS", "classifier", "classifier"),
    "QuestionAnswering": ("QUESTION_ANS", "qa_outputs", "qa_outputs"),
}


@pytest.mark.parametrize("task", HEADS)
def test_the_head_that_peft_adds_by_itself_is_promised_too(
    tmp_path: Path, roberta_base: Path, task: str
) -> None:
    kind, _, part = HEADS[task]
    model = getattr(transformers, f"RobertaFor{task}").from_pretrained(roberta_base)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type=kind))
    randomize(lora)
    lora.save_pretrained(tmp_path)
    read_run(tmp_path, ReadOptions(base=roberta_base))
    drop(tmp_path, f"{part}.")
    for target in ("merged", "peft"):
        with pytest.raises(RunError, match="trained whole"):
            run = read_run(tmp_path, ReadOptions(base=roberta_base))
            write_adapter(run, tmp_path / target, base=roberta_base)


def test_what_peft_passes_over_is_no_promise(tmp_path: Path, llama_base: Path) -> None:
    # Names that the model does not have, and a head that the task brings of other models.
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    edit(run, modules_to_save=["lm_head", "score", "classifier", "wte"])
    assert read_run(run, ReadOptions(base=llama_base)).warnings == ()
    edit(run, target_modules=["q_proj", "c_attn"])
    (warning,) = read_run(run, ReadOptions(base=llama_base)).warnings
    assert "c_attn" in warning and "q_proj" not in warning
    prove(llama_base, run, tmp_path)


def test_without_a_base_it_is_said_that_something_may_be_lost(
    tmp_path: Path, llama_base: Path
) -> None:
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    edit(run, base_model_name_or_path=None)
    assert read_run(run).warnings == ()
    drop(run, "lm_head")
    (warning,) = read_run(run).warnings
    assert "lm_head" in warning and "`base`" in warning


def test_a_target_that_is_found_nowhere_is_said(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", target_modules=["q_proj", "k_proj"])
    assert read_run(run, ReadOptions(base=llama_base)).warnings == ()
    drop(run, "k_proj")
    (warning,) = read_run(run, ReadOptions(base=llama_base)).warnings
    assert "k_proj" in warning and "q_proj" not in warning


def test_switches_that_nobody_knows_are_said(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", use_rslora=True)
    assert read_run(run, ReadOptions(base=llama_base)).warnings == ()
    edit(run, use_tomorrow=True, use_yesterday=False, rank_of_tomorrow=3, next_config={"a": 1})
    (warning,) = read_run(run, ReadOptions(base=llama_base)).warnings
    assert "use_tomorrow" in warning and "use_yesterday" not in warning
    assert "next_config" in warning and "rank_of_tomorrow" not in warning


def test_switches_of_a_tuner_that_peft_knows_are_not(tmp_path: Path, llama_base: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], use_effective_conv2d=True)
    model = get_peft_model(loaded(llama_base), config)
    randomize(model, ("hada_",))
    model.save_pretrained(tmp_path)
    assert read_run(tmp_path, ReadOptions(base=llama_base)).warnings == ()
    edit(tmp_path, use_tomorrow=True)
    (warning,) = read_run(tmp_path, ReadOptions(base=llama_base)).warnings
    assert "use_tomorrow" in warning


def test_files_beside_the_adapter_are_said(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run")
    options = ReadOptions(base=llama_base)
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, run / "value_head.safetensors")
    (warning,) = read_run(run, options).warnings
    assert "value_head.safetensors" in warning
    for name in ("new_embeddings.safetensors", "non_lora_trainables.safetensors"):
        save_file({"weight": torch.ones(2, 32)}, run / name)
        with pytest.raises(RunError) as error:
            read_run(run, options)
        assert error.value.file == run / name and error.value.remedy
        (run / name).unlink()


TIED: dict[str, dict[str, Any]] = {
    "nothing tied": {},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding, full name": {"target_modules": ["q_proj", "model.embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "by a pattern": {"target_modules": r".*(q_proj|embed_tokens)"},
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [3, 5]}},
}


@pytest.mark.parametrize("ensured", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "case", quick(TIED, "nothing tied", "whole both", "embedding", "both", "tokens of both", "head")
)
def test_weights_kept_tied_or_not(tmp_path: Path, case: str, tied: bool, ensured: bool) -> None:
    base = base_of(tmp_path / "base", tied)
    config = json.loads(json.dumps(TIED[case]))  # PEFT changes the lists it is given
    run = run_of(base, tmp_path / "run", ensure_weight_tying=ensured, **config)
    assert json.loads((run / CONFIG).read_text())["ensure_weight_tying"] is ensured
    prove(base, run, tmp_path, adapter="tokens" not in case)


def test_rows_that_differ_between_tied_sides(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=True)
    indices = {"embed_tokens": [3, 5], "lm_head": [3, 6]}
    run = run_of(base, tmp_path / "run", trainable_token_indices=indices)
    prove(base, run, tmp_path, adapter=False)


SAME = {
    "velora_config": lambda: peft.VeloraConfig(),
    "monteclora_config": lambda: peft.MontecloraConfig(),
}
OTHER: dict[str, tuple[str, Callable[[], Any]]] = {
    "kasa_config": ("KaSA", lambda: peft.KasaConfig()),
    "use_bdlora": (
        "BD-LoRA",
        lambda: peft.BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
        ),
    ),
    "alora_invocation_tokens": ("aLoRA", lambda: [3, 5]),
}


@pytest.mark.parametrize("key", SAME)
def test_variants_that_are_plain_lora_in_evaluation(
    tmp_path: Path, llama_base: Path, key: str
) -> None:
    run = run_of(llama_base, tmp_path / "run", **{key: SAME[key]()})
    assert any(key.split("_")[0] in name for name in load_file(run / FILE))
    prove(llama_base, run, tmp_path)


@pytest.mark.parametrize("key", OTHER)
def test_variants_that_are_not_are_refused_by_name(
    tmp_path: Path, llama_base: Path, key: str
) -> None:
    name, config = OTHER[key]
    targets = ["q_proj", "v_proj"]
    run = run_of(
        llama_base,
        tmp_path / "run",
        r=4,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **{key: config()},
    )
    with pytest.raises(RunError, match=name) as error:
        merge(run, tmp_path / "merged", base=llama_base)
    assert error.value.file == run / CONFIG and "PEFT" in str(error.value.remedy)


@pytest.mark.parametrize("kind", ["LORA", "ALORA"])
def test_an_invocation_string_is_said(tmp_path: Path, llama_base: Path, kind: str) -> None:
    run = run_of(llama_base, tmp_path / "run")
    edit(run, invocation_string="<|start|>", peft_type=kind)
    with pytest.raises(RunError, match="aLoRA"):
        read_run(run, ReadOptions(base=llama_base))


def encoder(out: Path, head: str = "ForSequenceClassification") -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
        num_labels=3,
    )
    model = getattr(transformers, f"Bert{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("still", ["bias", "weight"])
def test_a_module_trained_whole_is_stored_whole(tmp_path: Path, still: str) -> None:
    base = encoder(tmp_path / "base")
    lora = LoraConfig(r=3, target_modules=["query"], modules_to_save=["pooler", "LayerNorm"])
    model = get_peft_model(loaded(base), lora)
    other = {"bias": "weight", "weight": "bias"}[still]
    randomize(model, ("lora_", f"modules_to_save.default.dense.{other}", f"default.{other}"))
    model.save_pretrained(tmp_path / "run")
    prove(base, tmp_path / "run", tmp_path)
    names = [name for name in load_file(tmp_path / "adapter" / FILE) if "pooler" in name]
    assert (len(names) == 2) or still == "weight"


@pytest.mark.parametrize("change", ["lora_", "classifier.modules_to_save.default.weight"])
def test_a_head_that_training_left_alone_is_stored_all_the_same(
    tmp_path: Path, change: str
) -> None:
    base = encoder(tmp_path / "base")
    words = tuple({"lora_", change})
    run = run_of(base, tmp_path / "run", words, target_modules=["query"], task_type="SEQ_CLS")
    prove(base, run, tmp_path)
    names = {name for name in load_file(tmp_path / "adapter" / FILE) if "classifier" in name}
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias"}


def test_an_update_that_is_zero_everywhere_is_said(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", words=())
    assert NO_UPDATE in merge(run, tmp_path / "merged", base=llama_base).warnings
    assert NO_UPDATE in write_adapter(run, tmp_path / "adapter", base=llama_base).warnings
    first = "update is zero everywhere"
    assert first in NO_UPDATE
    assert first in good("verify", run, tmp_path / "merged", "--base", llama_base)
    trained = run_of(llama_base, tmp_path / "trained")
    assert merge(trained, tmp_path / "other", base=llama_base).warnings == ()
    assert write_adapter(trained, tmp_path / "another", base=llama_base).warnings == ()
    assert verify(read_run(trained), tmp_path / "other", llama_base).passed
    assert first not in good("verify", trained, tmp_path / "other", "--base", llama_base)


def test_an_unknown_base_of_the_hub_is_no_error(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    edit(run, base_model_name_or_path="somebody/nothing")
    shutil.copytree(run, tmp_path / "copy")
    drop(run, "lm_head")
    assert [bool(read_run(path).warnings) for path in (run, tmp_path / "copy")] == [True, False]
