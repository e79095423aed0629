"""Artifacts as transformers and PEFT load them, and what they say of loading them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, LlamaForCausalLM

from converters.errors import ArtifactError, BaseError, TargetError
from converters.model.base import open_base
from converters.readers import read_run
from converters.run import Run
from converters.targets.model import Reading, equal_choices, logits, open_in
from converters.targets.opening import (
    allowed,
    attach,
    attention,
    class_of,
    load,
    load_base,
    open_peft,
    open_transformers,
)
from tests.conftest import tiny_llama
from tests.converters import naming
from tests.converters.made import WEIGHTS, lazy, make_run

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}
ADAPTER = "adapter_model.safetensors"
NONE: frozenset[str] = frozenset()


def edited(folder: Path, out: Path, change: Any, file: str = WEIGHTS) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / file)
    change(tensors)
    save_file(tensors, out / file, {"format": "pt"})
    return out


def a_run(folder: Path, **more: Any) -> Run:
    return make_run(folder, {}, **more)


def test_a_model_folder_computes_what_transformers_computes(
    llama_base: Path, llama_lora: Path
) -> None:
    model = open_transformers(llama_base, open_base(llama_base), read_run(llama_lora))
    assert (model.missing, model.unexpected, model.dtype) == (NONE, NONE, "float32")
    assert (model.rounded, model.share, model.top1) == (None, 0.0, 1.0)
    live = LlamaForCausalLM.from_pretrained(llama_base, dtype=torch.float32)
    found = model.read([INPUTS, INPUTS])
    assert len(found.values) == 2
    with torch.no_grad():
        expected = live(**INPUTS).logits * INPUTS["attention_mask"].unsqueeze(-1)
    assert torch.equal(found.values[1], expected)
    assert not found.values[0][1, 2].any()  # a padded position
    assert torch.equal(found.measure(live)[0], expected)
    assert found.top1(live, found.values)(0.0) == 1.0


def test_what_is_missing_or_not_expected_is_told(llama_base: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.other.weight"] = tensors.pop(name)

    folder = edited(llama_base, tmp_path / "out", change)
    base, run = open_base(llama_base), a_run(tmp_path / "run")
    model = open_transformers(folder, base, run)
    assert model.missing == {name}
    assert model.unexpected == {"model.layers.1.mlp.other.weight"}
    # What is missing is at random, and another random than the live model's.
    state = torch.random.get_rng_state()
    live = load(run, open_base(folder))
    assert live.missing == {name}
    again, other = load(run, open_base(folder)), load(run, open_base(folder), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    (one, same, another) = (m.model.state_dict()[name] for m in (live, again, other))
    assert torch.equal(one, same) and not torch.equal(one, another)
    found = model.read([INPUTS])
    assert not torch.equal(found.values[0], found.measure(live.model)[0])
    assert torch.equal(found.values[0], found.measure(other.model)[0])


@pytest.mark.parametrize(
    ("architectures", "found"),
    [(["NothingForCausalLM"], "NothingForCausalLM"), (None, None), ([], None)],
)
def test_a_class_that_transformers_lacks(
    llama_base: Path, tmp_path: Path, architectures: object, found: str | None
) -> None:
    folder = Path(shutil.copytree(llama_base, tmp_path / "out"))
    config = {**json.loads((folder / "config.json").read_text()), "architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="unknown architecture") as caught:
        open_transformers(folder, open_base(llama_base), a_run(tmp_path / "run"))
    assert (caught.value.file, caught.value.found) == (folder / "config.json", found)


def test_an_adapter_beside_the_weights_is_no_merged_model(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_base, tmp_path / "out"))
    shutil.copytree(llama_lora, folder, dirs_exist_ok=True)
    # transformers computes what was trained, and who reads the weights alone does not.
    assert LlamaForCausalLM.from_pretrained(folder).peft_config
    with pytest.raises(ArtifactError, match="an adapter lies beside the weights") as caught:
        open_transformers(folder, open_base(llama_base), read_run(llama_lora))
    assert caught.value.file == folder / "adapter_config.json"


def test_what_is_not_loaded_is_an_error_of_the_artifact(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    base, run = open_base(llama_base), read_run(llama_lora)
    folder = Path(shutil.copytree(llama_base, tmp_path / "out"))
    (folder / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="header length is beyond the end") as caught:
        open_transformers(folder, base, run)
    assert caught.value.file == folder / WEIGHTS
    shutil.copy(llama_base / WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "nonsense"}))
    with pytest.raises(ArtifactError, match="transformers does not load") as caught:
        open_transformers(folder, base, run)
    assert caught.value.file == folder
    assert "nonsense" in str(caught.value.found)
    adapter = Path(shutil.copytree(llama_lora, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "nonsense"}))
    with pytest.raises(ArtifactError, match="PEFT does not load") as caught:
        open_peft(adapter, base, run)
    assert caught.value.file == adapter


def test_an_adapter_computes_what_peft_computes(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    base, run = open_base(llama_base), read_run(llama_lora)
    model = open_peft(llama_lora, base, run)
    assert (model.missing, model.unexpected, model.rounded) == (NONE, NONE, None)
    live = PeftModel.from_pretrained(load_base(run, base), str(llama_lora))
    assert torch.equal(model.read([INPUTS]).values[0], logits(live, INPUTS))
    half = edited(
        llama_lora,
        tmp_path / "half",
        lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}),
        ADAPTER,
    )
    narrow = open_peft(half, base, run)
    assert (narrow.dtype, narrow.rounded, narrow.share) == ("bfloat16", None, 0.05)
    lost = edited(
        llama_lora, tmp_path / "lost", lambda tensors: tensors.pop(next(iter(tensors))), ADAPTER
    )
    told = attach(load_base(run, base), lost)
    assert len(told.missing) == 1 and told.unexpected == NONE
    assert not told.model.training


@pytest.mark.parametrize(
    ("dtypes", "dtype", "rounded", "share"),
    [
        ([torch.float32], "float32", None, (0.0, 0.0)),
        ([torch.float32, torch.bfloat16, torch.int64], "bfloat16", torch.bfloat16, (0.0, 0.05)),
        ([torch.float16, torch.int8], "float16", torch.float16, (0.0, 0.05)),
        ([torch.int8], "float32", None, (0.0, 0.0)),
        ([], "float32", None, (0.0, 0.0)),
    ],
)
def test_the_narrowest_dtype_says_what_may_differ(
    tmp_path: Path,
    dtypes: list[torch.dtype],
    dtype: str,
    rounded: torch.dtype | None,
    share: tuple[float, float],
) -> None:
    files = []
    for number, each in enumerate(dtypes):
        files.append(tmp_path / f"{number}.safetensors")
        save_file({"x": torch.ones(2).to(each)}, files[-1])
    merged, adapter = (allowed(files, merged=kind) for kind in (True, False))
    assert merged == {"dtype": dtype, "rounded": rounded, "share": share[0]}
    assert adapter == {"dtype": dtype, "rounded": None, "share": share[1]}


@pytest.mark.parametrize(
    ("task", "labels", "name"),
    [
        (None, None, "LlamaForCausalLM"),
        ("causal-lm", None, "LlamaForCausalLM"),
        ("sequence-classification", 5, "LlamaForSequenceClassification"),
        ("token-classification", 3, "LlamaForTokenClassification"),
        ("question-answering", None, "LlamaForQuestionAnswering"),
        ("feature-extraction", None, "LlamaModel"),
    ],
)
def test_the_class_that_a_run_was_trained_in(
    llama_base: Path, tmp_path: Path, task: str | None, labels: int | None, name: str
) -> None:
    run = a_run(tmp_path / "run", task=task, num_labels=labels)
    cls, config = class_of(run, open_base(llama_base))
    assert cls.__name__ == name
    assert config.num_labels == (labels or 2)
    loaded = load(run, open_base(llama_base))
    assert isinstance(loaded.model, cls)
    if name != "LlamaForQuestionAnswering":  # it calls its body otherwise, and finds none of it
        assert {key.split(".")[0] for key in loaded.missing} <= {"score"}
        assert bool(loaded.missing) is name.endswith("Classification")


def test_a_class_that_is_for_a_task_by_another_name(tmp_path: Path) -> None:
    naming.make(tmp_path, naming.FAMILIES["llava"])
    run = a_run(tmp_path / "run", task="seq2seq-lm")
    cls, _ = class_of(run, open_base(tmp_path / "base"))
    assert cls.__name__ == "LlavaForConditionalGeneration"


def test_classes_that_there_are_not(llama_base: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", task="seq2seq-lm")
    with pytest.raises(BaseError, match="no class for this base and task") as caught:
        class_of(run, open_base(llama_base))
    assert caught.value.found == "LlamaForCausalLM, seq2seq-lm"
    folder = Path(shutil.copytree(llama_base, tmp_path / "base"))
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(BaseError, match="does not know this base") as caught:
        class_of(run, open_base(folder))
    assert caught.value.file == folder


def test_a_base_that_does_not_fit_its_configuration(llama_base: Path, tmp_path: Path) -> None:
    base = edited(
        llama_base, tmp_path / "base", lambda t: t.update({"lm_head.weight": torch.ones(80, 31)})
    )
    with pytest.raises(BaseError, match="does not load this base") as caught:
        load(a_run(tmp_path / "run"), open_base(base))
    assert (caught.value.file, caught.value.expected) == (base, "a LlamaForCausalLM")


def test_an_embedding_has_the_rows_that_the_run_brings(llama_base: Path, tmp_path: Path) -> None:
    whole = lazy(tmp_path / "run", {"model.embed_tokens.weight": torch.ones(83, 32)})
    run = a_run(tmp_path / "run", replaced=whole)
    model = load_base(run, open_base(llama_base))
    assert model.get_input_embeddings().weight.shape == (83, 32)
    assert load_base(a_run(tmp_path / "run"), open_base(llama_base)).vocab_size == 80


def test_another_class_when_it_is_asked_for(llama_base: Path, tmp_path: Path) -> None:
    base, run = open_base(llama_base), a_run(tmp_path / "run")
    assert type(load(run, base, architecture="LlamaModel").model).__name__ == "LlamaModel"
    assert type(load(run, base, architecture="LlamaForCausalLM").model) is LlamaForCausalLM


def test_a_soft_cap_needs_the_eager_attention() -> None:
    assert attention(Gemma2Config(attn_logit_softcapping=50.0)) == "eager"
    assert attention(Gemma2Config(attn_logit_softcapping=None)) is None
    assert attention(transformers.LlamaConfig()) is None


def test_an_adapter_inside_the_head(llama_base: Path, tmp_path: Path) -> None:
    """Trained in `AutoModel`, without a prefix of the whole model's."""
    from peft import LoraConfig, get_peft_model

    inner = transformers.LlamaModel.from_pretrained(llama_base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(inner, config).save_pretrained(tmp_path / "lora")
    whole = LlamaForCausalLM.from_pretrained(llama_base)
    told = attach(whole, tmp_path / "lora", inside=True)
    assert (told.missing, told.unexpected) == (NONE, NONE)
    plain = LlamaForCausalLM.from_pretrained(llama_base)
    assert not torch.allclose(logits(whole, INPUTS), logits(plain, INPUTS))


def test_choices_within_a_bound_are_the_same() -> None:
    truth = [torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.5]])]
    found = [torch.tensor([[0.9, 1.0, 0.0], [0.0, 1.0, 0.5]])]
    assert equal_choices(truth, truth) == 1.0
    assert equal_choices(found, truth) == 0.5
    assert equal_choices(found, truth, within=0.04) == 0.5
    assert equal_choices(found, truth, within=0.06) == 1.0
    both = [*found, torch.eye(2)], [*truth, torch.eye(2)]
    assert equal_choices(*both) == 0.75


def test_engines_by_name(llama_base: Path, llama_lora: Path, tmp_path: Path) -> None:
    base, run = open_base(llama_base), read_run(llama_lora)
    found = open_in("peft", llama_lora, base, run).read([INPUTS])
    assert isinstance(found, Reading)
    with pytest.raises(TargetError, match="not installed") as caught:
        open_in("nothing", tmp_path, base, run)
    assert (caught.value.file, caught.value.found) == (tmp_path, "nothing")


def test_what_is_compared_of_each_kind_of_output(llama_base: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 20}
    config = transformers.BertConfig(**small, **rest)
    mask = INPUTS["attention_mask"]
    torch.manual_seed(0)
    asked = transformers.BertForQuestionAnswering(config).eval()
    with torch.no_grad():
        output = asked(**INPUTS)
    expected = torch.stack([output.start_logits, output.end_logits]) * mask
    assert torch.equal(logits(asked, INPUTS), expected)
    assert not logits(asked, INPUTS)[:, 1, 2].any()
    assert bool(logits(asked, {**INPUTS, "attention_mask": torch.ones_like(mask)})[:, 1, 2].all())
    body = transformers.BertModel(config).eval()
    with torch.no_grad():
        output = body(**INPUTS)
    assert torch.equal(logits(body, INPUTS), output.last_hidden_state * mask.unsqueeze(-1))
    image = transformers.ViTConfig(**small, intermediate_size=24, image_size=8, patch_size=4)
    sees = transformers.ViTModel(image).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        output = sees(**pixels)
    both = torch.cat([output.last_hidden_state.flatten(1), output.pooler_output], dim=1)
    assert torch.equal(logits(sees, pixels), both)
    half = transformers.ViTForImageClassification(image).eval().half()
    found = logits(half, pixels)  # its inputs take its dtype, what comes out float32
    assert (found.dtype, found.shape) == (torch.float32, (2, 2))
    both_kinds = LlamaForCausalLM.from_pretrained(llama_base, dtype=torch.bfloat16)
    assert logits(both_kinds, INPUTS).dtype == torch.float32


def test_a_merged_model_in_a_narrow_dtype_says_so(llama_base: Path, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "out")
    model = open_transformers(tmp_path / "out", open_base(llama_base), a_run(tmp_path / "run"))
    assert (model.dtype, model.rounded, model.share) == ("bfloat16", torch.bfloat16, 0.0)


def test_an_adapter_of_the_text_model_opens_in_that_model(tmp_path: Path) -> None:
    naming.make(tmp_path, naming.FAMILIES["qwen3.5, text"])
    base, run = open_base(tmp_path / "base"), read_run(tmp_path / "lora")
    model = open_peft(tmp_path / "lora", base, run)
    assert (model.missing, model.unexpected) == (NONE, NONE)
    live = naming.load(naming.FAMILIES["qwen3.5, text"], tmp_path / "base")
    told = attach(live, tmp_path / "lora")
    found = model.read([INPUTS])
    assert torch.allclose(found.values[0], logits(told.model, INPUTS), atol=1e-6)
