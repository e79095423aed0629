"""Classes that set the padding's row to zero whenever they load, whatever the file holds: what is
merged equals PEFT's live model, or is refused where a merged model cannot hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import TargetError
from converters.model.base import open_base
from converters.model.zeroed import zeroed_rows
from dora_serve import ReadOptions, merge, read_run, verify, write_adapter
from tests.conftest import randomize
from tests.converters.families import DECODER, ENCODER
from tests.converters.test_peft_kinds import saved
from tests.converters.tied_families import EYES, KOSMOS

EYED: dict[str, Any] = {"vision_config": {**EYES, "projection_dim": 32}}
# class, its configuration, the embedding, the padding's row
CLASSES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "Kosmos2ForConditionalGeneration": (
        "Kosmos2Config",
        {"text_config": KOSMOS, **EYED, "latent_query_num": 4},
        "text_model.model.embed_tokens",
        1,
    ),
    "ChineseCLIPModel": (
        "ChineseCLIPConfig",
        {"text_config": ENCODER, **EYED, "projection_dim": 32},
        "text_model.embeddings.word_embeddings",
        0,
    ),
    "FunnelForMaskedLM": (
        "FunnelConfig",
        {"vocab_size": 80, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
        | {"block_sizes": [1, 1], "num_decoder_layers": 1, "pad_token_id": 0},
        "funnel.embeddings.word_embeddings",
        0,
    ),
}
if Version(transformers.__version__) >= Version("5.20"):  # which leaves the row as it lies
    del CLASSES["Kosmos2ForConditionalGeneration"]
HEADS = {
    "Kosmos2ForConditionalGeneration": "text_model.lm_head",
    "FunnelForMaskedLM": "lm_head",
}
HEADS = {name: head for name, head in HEADS.items() if name in CLASSES}


def run_of(name: str, base: Path, out: Path, trained: bool, **said: Any) -> Path:
    """An adapter of `name`, of whose embedding the padding's row has an update where `trained`."""
    model = getattr(transformers, name).from_pretrained(base)
    live = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **said))
    randomize(live, ("lora_", "modules_to_save"))
    with torch.no_grad():
        for key, parameter in live.named_parameters():
            if not trained and "lora_embedding_A" in key:
                parameter[:, CLASSES[name][3]] = 0
    live.save_pretrained(out)
    return out


@pytest.mark.parametrize("name", CLASSES)
def test_the_rows_are_found_by_what_the_class_does(tmp_path: Path, name: str) -> None:
    config, values, module, row = CLASSES[name]
    base = saved(name, config, values, tmp_path / "base")
    weight = f"{module}.weight"
    assert bool(load_file(base / "model.safetensors")[weight][row].any())
    loaded = getattr(transformers, name).from_pretrained(base).get_parameter(weight)
    assert [n for n, each in enumerate(loaded) if not each.any()] == [row]
    assert zeroed_rows(open_base(base), name, None) == {weight: (row,)}


def test_a_class_without_such_rows(tmp_path: Path) -> None:
    base = saved("BertForMaskedLM", "BertConfig", ENCODER, tmp_path / "bert")
    assert zeroed_rows(open_base(base), "BertForMaskedLM", None) == {}
    base = saved("LlamaForCausalLM", "LlamaConfig", DECODER, tmp_path / "llama")
    assert zeroed_rows(open_base(base), "LlamaForCausalLM", None) == {}


@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.further), "LoRA"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_tied_to_such_an_embedding(tmp_path: Path, name: str, way: str) -> None:
    """Untied, the head holds the row as the live model had it: zero, and its update."""
    config, values, module, row = CLASSES[name]
    base = saved(name, config, values, tmp_path / "base")
    head = HEADS[name]
    inner = next(
        n
        for n, m in getattr(transformers, name).from_pretrained(base).named_modules()
        if isinstance(m, torch.nn.Linear) and n != head
    )
    said: dict[str, Any] = {"target_modules": [inner, head]}
    if way == "whole":
        said = {"target_modules": [inner], "modules_to_save": [head]}
    run = read_run(run_of(name, base, tmp_path / "run", True, **said), ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    write_adapter(run, tmp_path / "adapter", base=base)
    for artifact in ("merged", "adapter"):
        found = verify(run, tmp_path / artifact, base)
        assert found.passed and found.truth == "peft" and found.control > 10 * found.tolerance
    old = load_file(base / "model.safetensors")[f"{module}.weight"][row]
    before = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(before)
    assert not tensors[f"{module}.weight"][row].any()
    if way == "LoRA":  # the control: with the row that the base's file holds
        tensors[f"{head}.weight"][row] += old
        save_file(tensors, before, {"format": "pt"})
        assert not verify(run, tmp_path / "merged", base).passed


@pytest.mark.parametrize("name", CLASSES)
def test_an_update_of_such_a_row(tmp_path: Path, name: str) -> None:
    """No merged model can hold it; training gives the row none."""
    config, values, module, _ = CLASSES[name]
    base = saved(name, config, values, tmp_path / "base")
    for trained in (False, True):
        out = run_of(name, base, tmp_path / f"run-{trained}", trained, target_modules=[module])
        run = read_run(out, ReadOptions(base=base))
        if trained:
            with pytest.raises(TargetError, match="to zero whenever it loads") as error:
                merge(run, tmp_path / "refused", base=base)
            assert error.value.tensor == f"{module}.weight" and error.value.remedy
            write_adapter(run, tmp_path / "adapter", base=base)
            assert verify(run, tmp_path / "adapter", base).passed
        else:
            merge(run, tmp_path / "merged", base=base)
            assert verify(run, tmp_path / "merged", base).passed
