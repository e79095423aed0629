"""Lint's verdict is what PEFT, and transformers' own loader, do with the file: both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from converters.targets.lora_folder import CONFIG, WEIGHTS
from dora_serve import merge, read_run, write_adapter
from tests.conftest import made_once
from tests.converters.families import save_base
from tests.converters.lint_cases import FURTHER, NONE, QUICK, Plant
from tests.converters.naming import (
    BOTH,
    BOUND,
    FAMILIES,
    OTHERS,
    WRAPPED,
    computed,
    computes,
    errors,
    load,
    logits,
    make,
    renamed,
)

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    def made_for(family: str) -> Path:
        name = "".join(letter for letter in family if letter.isalnum())
        folder = made_once(
            tmp_path_factory, f"naming-{name}", lambda place: make(place, FAMILIES[family])
        )
        return folder / "base"

    return made_for


def train(model: Any, config: Any, out: Path) -> torch.Tensor:
    """An adapter on `model` in `out`; the logits of what was trained."""
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    truth = logits(tuned)
    tuned.save_pretrained(out)
    return truth


def spoilt(plant: Plant | None, lora: Path) -> None:
    if plant is None:
        return
    tensors, config = load_file(lora / WEIGHTS), json.loads((lora / CONFIG).read_text())
    before = {key: tensor.clone() for key, tensor in tensors.items()}, dict(config)
    plant(tensors, config)
    same = tensors.keys() == before[0].keys() and config == before[1]
    assert not same or any(not torch.equal(tensors[key], before[0][key]) for key in tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, lora / WEIGHTS)
    (lora / CONFIG).write_text(json.dumps(config))


def _cases() -> list[Any]:
    further = [pytest.param(name, id=name, marks=pytest.mark.further) for name in FURTHER]
    return [*(pytest.param(name, id=name) for name in QUICK), *further]


@pytest.mark.parametrize("name", _cases())
def test_the_verdict_is_what_the_engines_do(tmp_path: Path, made: Made, name: str) -> None:
    case = {**QUICK, **FURTHER}[name]
    family, base = FAMILIES[case.family], made(case.family)
    targets = list(family.targets) if isinstance(family.targets, tuple) else family.targets
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": family.task}
    plain = logits(load(family, base))
    config = LoraConfig(**{**settings, **case.trained})
    truth = train(load(family, base), config, tmp_path / "lora")
    assert float((truth - plain).abs().max()) > 100 * BOUND
    spoilt(case.plant, tmp_path / "lora")
    computes = {e for e in BOTH if computed(e, case.family, base, tmp_path / "lora", truth)}
    told = {e for e in BOTH if not errors(tmp_path / "lora", base, e)}
    assert told == computes == case.computes


LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TUNERS: dict[str, Callable[[], Any]] = {
    "loha": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **LINEAR),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR),
    "vera": lambda: peft.VeraConfig(r=4, **LINEAR),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=16, **LINEAR),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, **LINEAR),
    "shira": lambda: peft.ShiraConfig(r=2, **LINEAR),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=list(range(5, 60)), task_type="CAUSAL_LM"
    ),
}
FORMS: dict[str, Callable[[str], str]] = {
    "PEFT": str,
    **{form: WRAPPED[form] for form in ("torch.compile", "FSDP", "DDP", "no prefix")},
    "AutoModel": OTHERS["AutoModel"],
}
QUICK_TUNERS = {"loha", "vera"}


@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK_TUNERS else pytest.param(k, marks=pytest.mark.further) for k in TUNERS],
)
def test_every_tuner_under_every_form_of_a_name(tmp_path: Path, made: Made, kind: str) -> None:
    base, family = made("llama"), FAMILIES["llama"]
    plain = logits(load(family, base))
    truth = train(load(family, base), TUNERS[kind](), tmp_path / "clean")
    assert float((truth - plain).abs().max()) > 10 * BOUND
    for number, (form, change) in enumerate(FORMS.items()):
        lora = renamed(tmp_path / "clean", tmp_path / str(number), change, every=True)
        computes = {e for e in BOTH if computed(e, "llama", base, lora, truth)}
        assert {e for e in BOTH if not errors(lora, base, e)} == computes, form
        merge(read_run(lora, ReadOptions(base=base)), tmp_path / f"merged-{number}", base=base)
        merged = logits(load(family, tmp_path / f"merged-{number}"))
        assert float((merged - truth).abs().max()) <= BOUND, form


# Family → further settings of the base, what single experts are called on disk, and who computes
# the file as it lies there.
SINGLE: dict[str, tuple[dict[str, Any], tuple[str, ...], frozenset[str]]] = {
    "qwen3-moe": ({}, ("experts.", "q_proj"), BOTH),
    "qwen3-moe, beside a dense layer": ({"mlp_only_layers": [0]}, ("mlp.", "q_proj"), NONE),
    "qwen3-moe, two experts": ({}, ("experts.0.gate_proj", "experts.2.up_proj"), NONE),
    "qwen2-moe": ({}, ("experts.", "q_proj"), NONE),
    "qwen2-moe, and what they share": ({}, ("experts.", "shared_expert."), NONE),
    "mixtral": ({}, ("experts.", "v_proj"), BOTH),
    "mixtral, one expert": ({}, ("experts.1.w2", "v_proj"), NONE),
}


def _single() -> list[Any]:
    asked = tuple(sorted(BOTH))

    def marks(name: str) -> list[pytest.MarkDecorator]:
        row: dict[str, Any] = {"family": name, "form": "single experts", "asked": asked}
        row["computes"] = tuple(sorted(SINGLE[name][2]))
        return [pytest.mark.named(**row), *([] if "two" in name else [pytest.mark.further])]

    return [pytest.param(name, marks=marks(name), id=name) for name in SINGLE]


@pytest.mark.parametrize("name", _single())
def test_single_experts_are_written_as_peft_holds_them(tmp_path: Path, name: str) -> None:
    """As transformers 4 trained them. The truth is the base with the products added to its file."""
    settings, parts, expected = SINGLE[name]
    family = name.partition(",")[0]
    base = tmp_path / "base"
    cls = save_base(family, base, **settings)
    stored, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    added = dict(stored)
    for key, weight in stored.items():
        if key.endswith(".weight") and weight.dim() == 2 and any(part in key for part in parts):
            a = torch.randn(4, weight.shape[1], generator=generator) * 0.2
            b = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            added[key] = weight + 2 * b @ a
    kinds = sorted({key.partition(".lora_")[0].rpartition(".")[2] for key in factors})
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": kinds}
    (tmp_path / "lora" / CONFIG).write_text(json.dumps({**config, "r": 4, "lora_alpha": 8}))
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "config.json").write_text((base / "config.json").read_text())
    save_file(added, tmp_path / "right" / "model.safetensors", {"format": "pt"})
    truth, plain = (logits(cls.from_pretrained(folder)) for folder in (tmp_path / "right", base))
    assert float((truth - plain).abs().max()) > 100 * BOUND

    lora = tmp_path / "lora"
    found = {e for e in BOTH if computes(e, cls.from_pretrained(base), lora, truth)}
    assert {e for e in BOTH if not errors(lora, base, e)} == found == expected

    run = read_run(lora, ReadOptions(base=base))
    write_adapter(run, tmp_path / "written", base=base)
    live = PeftModel.from_pretrained(cls.from_pretrained(base), str(tmp_path / "written"))
    assert float((logits(live) - truth).abs().max()) <= BOUND
    assert not errors(tmp_path / "written", base, "peft")
    for source in ("lora", "written"):
        run = read_run(tmp_path / source, ReadOptions(base=base))
        merge(run, tmp_path / f"merged-{source}", base=base)
        merged = logits(cls.from_pretrained(tmp_path / f"merged-{source}"))
        assert float((merged - truth).abs().max()) <= BOUND


@pytest.mark.further
def test_another_tuner_of_the_text_model_alone(tmp_path: Path, made: Made) -> None:
    """On a base that sees: the class whose names the adapter has is the one PEFT loads it into."""
    family, base = FAMILIES["qwen3.5, text"], made("qwen3.5, text")
    plain = logits(load(family, base))
    truth = train(load(family, base), TUNERS["loha"](), tmp_path / "clean")
    assert float((truth - plain).abs().max()) > 10 * BOUND
    for number, form in enumerate(("PEFT", "FSDP")):
        change = FORMS[form]
        lora = renamed(tmp_path / "clean", tmp_path / str(number), change, every=True)
        assert bool(errors(lora, base, "peft")) == (form == "FSDP")
        merge(read_run(lora, ReadOptions(base=base)), tmp_path / f"merged-{number}", base=base)
        merged = load(family, tmp_path / f"merged-{number}")
        assert float((logits(merged) - truth).abs().max()) <= BOUND
