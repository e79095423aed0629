"""`verify` of what lies beside the weights: what no prompt shows is told, and what one can show is
asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from converters.run import Run
from dora_serve import merge, read_run, verify
from dora_serve.proof import beside
from tests.conftest import MODELS, tiny_llama
from tests.converters.families import save_adapter

BASE = MODELS / "tiny-llama-base"
SAMPLE = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def run() -> Run:
    return read_run(SAMPLE)


@pytest.fixture(scope="module")
def merged(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    merge(run, out, base=BASE)
    return out


def said(name: str, **changes: object) -> Damage:
    def change(out: Path) -> None:
        known = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps({**known, **changes}))

    return change


def more(name: str, text: str = "{}") -> Damage:
    return lambda out: (out / name).write_text(text)


def other_weights(name: str) -> Damage:
    def write(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        save_file({n: t + 1 for n, t in tensors.items()}, out / name, {"format": "pt"})

    return write


def exchanged_words(out: Path) -> None:
    """Two words that stand in none of the texts."""
    words = json.loads((out / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    one, other = "seven", "three"
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (out / "tokenizer.json").write_text(json.dumps(words))


# Each changes what is deployed, and no logit of a short text.
ALIKE: dict[str, tuple[Damage, str]] = {
    "other ends": (said("config.json", eos_token_id=7), "eos_token_id"),
    "other ends of answers": (said("generation_config.json", eos_token_id=7), "eos_token_id"),
    "a penalty": (said("generation_config.json", repetition_penalty=3.0), "repetition_penalty"),
    "fewer positions": (said("config.json", max_position_embeddings=40), "max_position_embeddings"),
    "another end of texts": (said("tokenizer_config.json", eos_token="the"), "special tokens"),
    "another template": (more("chat_template.jinja", "{{ messages }}"), "chat template"),
    "a shard that no index names": (
        other_weights("model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors",
    ),
    "weights in another layout": (
        other_weights("consolidated.safetensors"),
        "consolidated.safetensors",
    ),
    "a quantization": (more("hf_quant_config.json"), "hf_quant_config.json"),
    "a quantization of the configuration": (
        said("config.json", quantization_config={"quant_method": "fp8"}),
        "config.json: names a quantization",
    ),
}


@pytest.mark.parametrize("damage", ALIKE)
def test_what_no_prompt_shows_is_told(run: Run, merged: Path, tmp_path: Path, damage: str) -> None:
    change, reason = ALIKE[damage]
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    change(out)
    certified = verify(run, out, BASE)
    assert certified.passed and "dora_export.json" in " ".join(certified.warnings)
    (out / "dora_export.json").unlink()  # as of a merge by anybody
    found = verify(run, out, BASE)
    assert found.passed and reason in " ".join(found.warnings)


def test_a_merge_that_transformers_saved_is_told_nothing_of(
    run: Run, merged: Path, tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/README.md").write_text("what it is")
    found = verify(run, tmp_path / "saved", BASE)
    assert found.passed and not found.warnings
    more("generation_config.json", "{")(tmp_path / "saved")
    broken = verify(run, tmp_path / "saved", BASE)
    assert not broken.passed and "generation_config.json" in " ".join(broken.failures)


def test_a_head_that_other_engines_leave_out_is_told(tmp_path: Path) -> None:
    """A configuration that ties it, as another tool's merge of a trained head leaves it: of what
    has its own values transformers 5 heeds that no more, and vLLM does."""
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "run")
    run = read_run(tmp_path / "run")
    merge(run, tmp_path / "out", base=tmp_path / "base")
    (tmp_path / "out/dora_export.json").unlink()
    assert not verify(run, tmp_path / "out", tmp_path / "base").warnings
    said("config.json", tie_word_embeddings=True)(tmp_path / "out")
    found = verify(run, tmp_path / "out", tmp_path / "base")
    assert found.passed and "have one of its own" in " ".join(found.warnings)


def test_a_note_beside_it_is_no_change(run: Run, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / "out" / name).write_text("what it is")
    assert not verify(run, tmp_path / "out", BASE).warnings


def test_words_that_no_text_has_keep_their_numbers(run: Run, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    exchanged_words(tmp_path / "out")
    found = verify(run, tmp_path / "out", BASE)
    assert not found.passed and "number" in " ".join(found.failures)


def test_a_fault_that_is_told_with_braces(
    run: Run, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_tokenizer", lambda *_: ("not the {whose}: {0} {x}", []))
    found = verify(run, merged, BASE)
    assert "not the base's: {0} {x}" in found.failures


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40},
    ],
    ids=["dynamic", "a window"],
)
def test_lengths_that_the_artifact_alone_names_are_crossed(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """A merge that computes otherwise behind a length at which the base does not."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "base")
    save_adapter(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "run")
    run = read_run(tmp_path / "run")
    merge(run, tmp_path / "out", base=tmp_path / "base")
    assert verify(run, tmp_path / "out", tmp_path / "base").passed
    said("config.json", **change)(tmp_path / "out")
    found = verify(run, tmp_path / "out", tmp_path / "base")
    assert not found.passed and found.max_abs > 10 * found.tolerance
