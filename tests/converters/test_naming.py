"""Names: whatever a run calls its modules, what is written is right, and lint says of a file as it
lies there exactly what PEFT and transformers do with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, RunError
from converters.model.base import open_base
from converters.readers import ReadOptions
from converters.targets.lora_folder import WEIGHTS
from dora_serve import Run, merge, read_run, write_adapter
from dora_serve.commands import dora_export
from dora_serve.folder.pairing import fits
from tests.conftest import made_once
from tests.converters.naming import (
    BOTH,
    BOUND,
    FAMILIES,
    OTHERS,
    WRAPPED,
    computed,
    errors,
    in_peft,
    load,
    logits,
    make,
    renamed,
    stranger,
)

TRANSFORMERS = frozenset({"transformers"})

# Family → form of name → the engines that compute the file as it lies there.
WRAPPERS: dict[str, frozenset[str]] = {
    **{form: frozenset() for form in WRAPPED},
    "PEFT's prefix twice": TRANSFORMERS,
    "no prefix": TRANSFORMERS,
    "the adapter's name": frozenset({"peft"}),
}
AS_IT_LIES: dict[str, dict[str, frozenset[str]]] = {
    "qwen2": {
        **WRAPPERS,
        "PEFT": BOTH,
        "AutoModel": TRANSFORMERS,
        "body twice": TRANSFORMERS,
        "DeepSpeed": frozenset(),
        "Lightning": TRANSFORMERS,
    },
    **{
        family: {**WRAPPERS, "PEFT": BOTH, "AutoModel": TRANSFORMERS}
        for family in ("llama", "mistral", "qwen3", "gemma3, decoder")
    },
    # Of families whose experts it fuses, PEFT gives names its prefix before it loads them.
    "qwen3-moe": {**WRAPPERS, "PEFT": BOTH, "no prefix": BOTH, "AutoModel": TRANSFORMERS},
    "roberta": {"PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "qwen2, base of AutoModel": {"PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "qwen2, embedding": {
        "PEFT": BOTH,
        "body twice": TRANSFORMERS,
        "sentence-transformers": frozenset(),
    },
    # transformers drops PEFT's prefix twice only where `model.` follows it.
    "gpt2": {"PEFT": BOTH, "AutoModel": TRANSFORMERS, "PEFT's prefix twice": frozenset()},
    "bert": {"PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "roberta, masked": {"PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "bart": {**WRAPPERS, "PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "t5": {**WRAPPERS, "PEFT": BOTH, "PEFT's prefix twice": frozenset()},
    "llava": {"PEFT": BOTH, "transformers 4": BOTH, "AutoModel": TRANSFORMERS},
    "gemma3": {"PEFT": BOTH, "transformers 4": BOTH, "AutoModel": TRANSFORMERS},
    "qwen2-vl": {
        "PEFT": BOTH,
        "transformers 4, qwen2-vl": TRANSFORMERS,
        "AutoModel": TRANSFORMERS,
    },
    "qwen3-vl": {"PEFT": BOTH, "AutoModel": TRANSFORMERS, "body twice": TRANSFORMERS},
    "qwen3.5": {"PEFT": BOTH, "AutoModel": TRANSFORMERS},
    "qwen3.5, text": {
        **WRAPPERS,
        "PEFT": BOTH,
        "no prefix": BOTH,
        "AutoModel": TRANSFORMERS,
    },
}
FORMS: dict[str, Callable[[str], str]] = {"PEFT": str, **WRAPPED, **OTHERS}
PLAIN = {
    "qwen2": {"PEFT", "torch.compile", "FSDP", "DDP, inside", "PEFT's prefix twice", "AutoModel"},
    "gemma3": {"transformers 4"},
    "qwen2-vl": {"PEFT", "AutoModel"},
    "qwen3.5, text": {"PEFT", "no prefix"},
}


def _cases() -> list[Any]:
    def marks(family: str, form: str) -> list[pytest.MarkDecorator]:
        computes = tuple(sorted(AS_IT_LIES[family][form]))
        asked = tuple(sorted(BOTH))
        found = [pytest.mark.named(family=family, form=form, computes=computes, asked=asked)]
        slow = family not in PLAIN or form not in PLAIN[family]
        return [*found, *([pytest.mark.further] if slow else [])]

    return [
        pytest.param(family, form, marks=marks(family, form), id=f"{family}: {form}")
        for family, forms in AS_IT_LIES.items()
        for form in forms
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made_for(family: str) -> Path:
        name = "".join(letter for letter in family if letter.isalnum())
        return made_once(
            tmp_path_factory, f"naming-{name}", lambda folder: make(folder, FAMILIES[family])
        )

    return made_for


def read(lora: Path, base: Path) -> Run:
    return read_run(lora, ReadOptions(base=base))


@pytest.mark.parametrize(("family", "form"), _cases())
def test_every_form_of_a_name(
    tmp_path: Path, made: Callable[[str], Path], family: str, form: str
) -> None:
    base, clean = made(family) / "base", made(family) / "lora"
    truth = in_peft(family, base, clean)
    plain = logits(load(FAMILIES[family], base))
    assert float((truth - plain).abs().max()) > 100 * BOUND
    lora = renamed(clean, tmp_path / "lora", FORMS[form])
    assert form == "PEFT" or load_file(lora / WEIGHTS).keys() != load_file(clean / WEIGHTS).keys()

    told = {engine for engine in sorted(BOTH) if not errors(lora, base, engine)}
    computes = {e for e in sorted(BOTH) if computed(e, family, base, lora, truth)}
    assert told == computes == AS_IT_LIES[family][form]

    assert fits(read(lora, base), open_base(base)) and read(lora, base).warnings == ()
    merge(read(clean, base), tmp_path / "right", base=base)
    merge(read(lora, base), tmp_path / "merged", base=base)
    right, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("right", "merged"))
    assert right.keys() == merged.keys() and all(torch.equal(right[n], merged[n]) for n in right)
    assert float((logits(load(FAMILIES[family], tmp_path / "merged")) - truth).abs().max()) <= BOUND

    write_adapter(read(lora, base), tmp_path / "adapter", base=base)
    assert float((in_peft(family, base, tmp_path / "adapter") - truth).abs().max()) <= BOUND
    assert not errors(tmp_path / "adapter", base, "peft")


@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen3.5", marks=pytest.mark.further)])
def test_a_name_that_no_class_has(tmp_path: Path, made: Callable[[str], Path], family: str) -> None:
    """A lenient lookup finds a tensor of that ending; no engine would, and nothing is written."""
    base, clean = made(family) / "base", made(family) / "lora"
    lora = renamed(clean, tmp_path / "lora", stranger)
    truth = in_peft(family, base, clean)
    for engine in sorted(BOTH):
        assert "no-such-module" in errors(lora, base, engine)
        assert not computed(engine, family, base, lora, truth)
    assert "no-such-module" in errors(lora, base, "vllm")
    for write in (merge, write_adapter):
        with pytest.raises(BaseError, match="no such module"):
            write(read(lora, base), tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    assert not fits(read(lora, base), open_base(base))


@pytest.mark.parametrize("family", ["qwen2, embedding", "qwen3.5, text"])
def test_each_target_gets_the_names_of_the_class_that_it_loads(
    tmp_path: Path, made: Callable[[str], Path], family: str
) -> None:
    base, clean = made(family) / "base", made(family) / "lora"
    whole = {"qwen2, embedding": "layers.0.", "qwen3.5, text": "model.language_model.layers.0."}
    for target, start in (("peft", None), ("vllm", whole[family])):
        write_adapter(read(clean, base), tmp_path / target, base=base, target=target)
        keys = load_file(tmp_path / target / WEIGHTS).keys()
        if start is None:
            assert keys == load_file(clean / WEIGHTS).keys()
        else:
            assert {key for key in keys if key.startswith(f"base_model.model.{start}")}
        assert not errors(tmp_path / target, base, target)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path, made: Callable[[str], Path]) -> None:
    base, clean = made("qwen2") / "base", made("qwen2") / "lora"
    lora = renamed(clean, tmp_path / "lora", str)
    tensors = load_file(lora / WEIGHTS)
    again = {f"_orig_mod.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **again}, lora / WEIGHTS)
    with pytest.raises(RunError, match="several adapters in one file"):
        read(lora, base)


def test_a_quantized_base_is_judged_by_its_names(
    tmp_path: Path, made: Callable[[str], Path]
) -> None:
    """Its files hold packed weights of other shapes, and PEFT computes beside them."""

    base, clean = made("qwen2") / "base", made("qwen2") / "lora"
    packed = tmp_path / "base"
    shutil.copytree(base, packed)
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))

    assert not errors(clean, packed, "vllm") and not errors(clean, packed, "peft")
    assert fits(read(clean, packed), open_base(packed))
    write_adapter(read(clean, packed), tmp_path / "lora", base=packed, target="vllm")
    truth = in_peft("qwen2", base, clean)
    assert float((in_peft("qwen2", base, tmp_path / "lora") - truth).abs().max()) <= BOUND
    other = renamed(clean, tmp_path / "other", stranger)
    assert "no-such-module" in errors(other, packed, "vllm")
    assert not fits(read(other, packed), open_base(packed))


def test_inspect_and_verify_know_the_text_model(
    tmp_path: Path, made: Callable[[str], Path]
) -> None:

    base, lora = made("qwen3.5, text") / "base", made("qwen3.5, text") / "lora"
    merge(read(lora, base), tmp_path / "merged", base=base)
    for target in ("peft", "vllm"):
        write_adapter(read(lora, base), tmp_path / target, base=base, target=target)
    told = CliRunner().invoke(dora_export, ["inspect", str(lora), "--base", str(base), "--json"])
    assert json.loads(told.stdout)["targets"]["vllm"].startswith("yes")
    for artifact in ("merged", "peft", "vllm"):
        found = CliRunner().invoke(
            dora_export, ["verify", str(lora), str(tmp_path / artifact), "--base", str(base)]
        )
        assert found.exit_code == 0, found.output
