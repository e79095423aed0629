"""Lint: planted faults are found and named, sound adapters are left in peace, --fix heals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from converters.lint import CHECKS, lint
from converters.model.base import open_base
from converters.targets.lora_folder import CONFIG, WEIGHTS
from converters.targets.target import profiles
from dora_serve import read_run, write_adapter
from dora_serve.commands import dora_export
from dora_serve.commands.lint import TARGETS
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import randomize, tiny_llama
from tests.dora_serve.faults import (
    FAULTS,
    PREFIX,
    QA,
    Config,
    Q,
    Tensors,
    change,
    configure,
    rank_of_q,
    rename,
    without,
)


def llama_adapter(base: Path, out: Path, **config: Any) -> Path:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(**{**values, **config})
    )
    randomize(model, ("lora_", "modules_to_save", ".bias"))
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def full(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every linear layer at one rank and scale, which every engine reads right."""
    return llama_adapter(llama_base, tmp_path_factory.mktemp("lint") / "full")


def spoil(source: Path, out: Path, plant: Callable[[Tensors, Config], object]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    config = json.loads((out / CONFIG).read_text())
    plant(tensors, config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, llama_base: Path, full: Path, name: str) -> None:
    fault = FAULTS[name]
    base = open_base(llama_base)
    broken = spoil(full, tmp_path / "broken", fault.plant)
    found = [f for f in lint(broken, base) if f.check == fault.check]
    hits = [f for f in found if fault.where in f.where and f.severity == fault.severity]
    assert hits, found
    assert {target for hit in hits for target in hit.targets} == set(fault.targets)
    assert all(hit.what and hit.found and hit.expected and hit.fix for hit in hits)
    assert fault.check not in {finding.check for finding in lint(full, base)}


def test_another_base_by_its_fingerprint(tmp_path: Path, llama_base: Path, full: Path) -> None:
    write_adapter(full, tmp_path / "ours", base=llama_base)
    assert not lint(tmp_path / "ours", open_base(llama_base), ["peft"])
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight += 0.01
    other.save_pretrained(tmp_path / "other")
    (finding,) = lint(tmp_path / "ours", open_base(tmp_path / "other"), ["peft"])
    assert (finding.check, finding.severity) == ("fingerprint", "error")
    assert finding.where == f"{Q}.weight"


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_one_side_of_a_tied_pair(tmp_path: Path, module: str) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    kind = module.split(".")[-1]
    lora = llama_adapter(base, tmp_path / "lora", target_modules=["q_proj", kind])
    found = [f for f in lint(lora, open_base(base)) if f.check == "tied"]
    assert {f.where for f in found} == {module}
    severities = {target: f.severity for f in found for target in f.targets}
    assert severities["peft"] == "warning" and severities["gguf"] == "error"
    fresh = llama_adapter(base, tmp_path / "fresh", target_modules=["q_proj"])
    assert "tied" not in {f.check for f in lint(fresh, open_base(base))}


def gpt2(folder: Path, **_: Any) -> tuple[Path, Path]:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(folder / "base"), lora)
    randomize(model)
    model.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


def test_conv1d_is_read_wrongly_by_the_converter_of_llama_cpp(tmp_path: Path) -> None:
    base, lora = gpt2(tmp_path)
    found = [
        f for f in lint(lora, open_base(base)) if f.severity == "error" and "gguf" in f.targets
    ]
    assert {f.check for f in found} == {"conv1d"}
    assert found[0].where == "transformer.h.0.attn.c_attn"


def ours(folder: Path, base: Path, target: str) -> Path:
    lora = llama_adapter(
        base, folder / "source", rank_pattern={"q_proj": 2, "down_proj": 7}, use_rslora=True
    )
    write_adapter(lora, folder / "lora", base=base, target=target)
    return folder / "lora"


def classifier(folder: Path, base: Path) -> Path:
    lora = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    peft = get_peft_model(model, lora)
    randomize(peft, ("lora_", "modules_to_save"))
    peft.save_pretrained(folder / "lora")
    return folder / "lora"


PEFTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one rank in every layer": ({}, TARGETS),
    "q and v": ({"target_modules": ["q_proj", "v_proj"]}, ("peft", "transformers", "vllm", "gguf")),
    "by an expression": ({"target_modules": r".*\.(q|k|v)_proj"}, TARGETS),
    "rsLoRA": ({"use_rslora": True}, ("peft", "transformers", "vllm", "lorax")),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        ("peft", "transformers"),
    ),
    "ranks of one scale": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        ("peft", "transformers", "vllm"),
    ),
    "one layer": ({"layers_to_transform": [1], "target_modules": ["q_proj"]}, ("peft", "vllm")),
    "embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        ("peft", "transformers", "gguf"),
    ),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, ("peft", "transformers", "gguf")),
    "whole head": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ("peft", "transformers"),
    ),
    "weight-decomposed": ({"use_dora": True}, ("peft",)),
    "bias in B": ({"lora_bias": True}, ("peft", "transformers")),
}


def quiet(folder: Path, base: Path, targets: tuple[str, ...]) -> None:
    for known in (open_base(base), None):
        loud = [f for f in lint(folder, known, targets) if f.severity != "info"]
        assert not loud, loud


@pytest.mark.parametrize("kind", PEFTS)
def test_a_sound_adapter_of_peft(tmp_path: Path, llama_base: Path, kind: str) -> None:
    config, targets = PEFTS[kind]
    quiet(llama_adapter(llama_base, tmp_path / "lora", **config), llama_base, targets)


@pytest.mark.parametrize(("trained", "fix"), [(False, "`adapter`"), (True, "`merge`")])
def test_a_head_that_was_kept_whole_and_not_trained(
    tmp_path: Path, llama_base: Path, trained: bool, fix: str
) -> None:
    lora = llama_adapter(llama_base, tmp_path / "lora", modules_to_save=["lm_head"])
    if not trained:
        tensors = load_file(lora / WEIGHTS)
        base = open_base(llama_base)
        name = next(name for name in tensors if name.endswith("lm_head.weight"))
        tensors[name] = base.tensors["lm_head.weight"].load()
        save_file(tensors, lora / WEIGHTS, {"format": "pt"})
    found = lint(lora, open_base(llama_base), ("vllm",))
    (finding,) = (each for each in found if each.severity == "error")
    assert fix in finding.fix
    if not trained:
        write_adapter(read_run(lora), tmp_path / "out", base=llama_base, target="vllm")
        quiet(tmp_path / "out", llama_base, ("vllm",))


@pytest.mark.parametrize(
    ("target", "engines"),
    [
        ("peft", ("peft", "transformers", "vllm")),
        ("vllm", ("peft", "transformers", "vllm")),
        ("sglang", TARGETS),
        ("lorax", TARGETS),
    ],
)
def test_a_sound_adapter_of_ours(
    tmp_path: Path, llama_base: Path, target: str, engines: tuple[str, ...]
) -> None:
    quiet(ours(tmp_path, llama_base, target), llama_base, engines)


def test_a_sound_classifier_and_conv1d(tmp_path: Path, roberta_base: Path) -> None:
    quiet(classifier(tmp_path / "roberta", roberta_base), roberta_base, ("peft",))
    base, lora = gpt2(tmp_path / "gpt2")
    quiet(lora, base, ("peft", "transformers"))


def test_families_that_vllm_does_not_adapt(tmp_path: Path, roberta_base: Path) -> None:
    base, lora = gpt2(tmp_path / "gpt2")
    for adapter, on in (
        (lora, base),
        (classifier(tmp_path / "roberta", roberta_base), roberta_base),
    ):
        found = [f for f in lint(adapter, open_base(on), ["peft", "vllm"]) if f.check == "family"]
        assert found
        assert {f.targets for f in found} == {("vllm",)}


@pytest.mark.parametrize(
    "kind", [kind for kind, (_, targets) in PEFTS.items() if "transformers" in targets]
)
def test_transformers_computes_what_peft_computes(
    tmp_path: Path, llama_base: Path, kind: str
) -> None:
    lora = llama_adapter(llama_base, tmp_path / "lora", **PEFTS[kind][0])
    model = LlamaForCausalLM.from_pretrained(llama_base).eval()
    inputs = verification_batch(model)
    plain = logits(model, inputs)
    model.load_adapter(str(lora))
    truth = peft_logits(llama_base, lora)
    assert float((logits(model, inputs) - truth).abs().max()) <= 1e-5
    assert float((plain - truth).abs().max()) > 1e-2


def test_transformers_loses_the_magnitudes_of_dora(tmp_path: Path, llama_base: Path) -> None:
    lora = llama_adapter(llama_base, tmp_path / "lora", use_dora=True)
    model = LlamaForCausalLM.from_pretrained(llama_base).eval()
    model.load_adapter(str(lora))
    loaded = logits(model, verification_batch(model))
    assert float((loaded - peft_logits(llama_base, lora)).abs().max()) > 1e-3


def peft_logits(base: Path, lora: Path) -> torch.Tensor:
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(lora)).eval()
    return logits(live, verification_batch(live))


def run(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(dora_export, ["lint", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize(
    ("plant", "target"),
    [
        (configure(alpha_pattern={Q: 3}, rank_pattern={}), "sglang"),
        (configure(use_rslora=True), "sglang"),
        (configure(alpha_pattern={Q: 3}, use_rslora=True), "vllm"),
        (rank_of_q(2), "lorax"),
        (without("layers.1.self_attn.q_proj", "k_proj"), "lorax"),
        (without("layers.1.self_attn.q_proj", "k_proj"), "sglang"),
        (change(QA, lambda a: a.double()), "peft"),
        (change(QA, lambda a: a * 1e7), "vllm"),
        (configure(fan_in_fan_out=True), "transformers"),
    ],
)
def test_fix_heals_and_changes_nothing(
    tmp_path: Path,
    llama_base: Path,
    full: Path,
    plant: Callable[[Tensors, Config], object],
    target: str,
) -> None:
    broken = spoil(full, tmp_path / "broken", plant)
    before = [f for f in lint(broken, open_base(llama_base), [target]) if f.severity != "info"]
    assert before
    out = tmp_path / "healed"
    arguments = (broken, "--base", llama_base, "--target", target, "--fix", out)
    code, told = run(*arguments)
    assert code == 0 and told["fix"]["written"]
    quiet(out, llama_base, (target,))
    scale = peft_logits(llama_base, broken)
    difference = (peft_logits(llama_base, out) - scale).abs().max()
    assert float(difference) <= 1e-4 * max(1.0, float(scale.abs().max()))


@pytest.mark.parametrize(
    "plant",
    [
        rename(PREFIX, ""),
        rename("lora_A.weight", "lora_A.mine.weight"),
        configure(target_modules=["k_proj"]),
    ],
)
def test_fix_gives_names_that_peft_knows(
    tmp_path: Path, llama_base: Path, full: Path, plant: Callable[[Tensors, Config], object]
) -> None:
    broken = spoil(full, tmp_path / "broken", plant)
    code, _ = run(broken, "--base", llama_base, "--target", "peft")
    assert code == 1
    code, _ = run(broken, "--base", llama_base, "--fix", tmp_path / "healed")
    assert code == 0
    truth = peft_logits(llama_base, full)
    assert float((peft_logits(llama_base, tmp_path / "healed") - truth).abs().max()) <= 1e-4
    assert float((peft_logits(llama_base, broken) - truth).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name",
    ["NaN", "B missing", "another adapter's configuration", "PiSSA", "another width than the base"],
)
def test_fix_says_what_it_cannot_heal(
    tmp_path: Path, llama_base: Path, full: Path, name: str
) -> None:
    broken = spoil(full, tmp_path / "broken", FAULTS[name].plant)
    code, told = run(broken, "--base", llama_base, "--fix", tmp_path / "healed")
    assert code == 1 and told["fix"]["not_healed"]
    assert not (tmp_path / "healed").exists()


def test_fix_writes_gguf(tmp_path: Path, llama_base: Path, full: Path) -> None:
    pytest.importorskip("gguf")
    broken = spoil(full, tmp_path / "broken", configure(use_rslora=True))
    out = tmp_path / "healed"
    code, _ = run(broken, "--base", llama_base, "--target", "gguf", "--fix", out)
    assert code == 0 and (out / "healed.gguf").is_file()


def test_the_smallest_setting_of_vllm(tmp_path: Path, full: Path) -> None:
    broken = spoil(full, tmp_path / "wide", rank_of_q(9))
    (slot,) = (f for f in lint(broken, None, ["vllm"]) if f.check == "slot")
    assert slot.severity == "info" and "--max-lora-rank 16" in slot.expected and Q in slot.where


def test_the_table_groups_by_engine(tmp_path: Path, llama_base: Path, full: Path) -> None:
    broken = spoil(full, tmp_path / "broken", configure(alpha_pattern={Q: 3}))
    result = CliRunner().invoke(dora_export, ["lint", str(broken), "--base", str(llama_base)])
    assert result.exit_code == 1
    order = [result.stdout.index(f"\n{target:<13}") for target in TARGETS]
    assert order == sorted(order)
    assert f"{Q}: 2; expected 0.75" in result.stdout
    assert "fix: dora-export lint with --target sglang and --fix" in result.stdout
    sound = CliRunner().invoke(dora_export, ["lint", str(full), "--base", str(llama_base)])
    assert sound.exit_code == 0 and "error" not in sound.stdout


def test_what_is_no_adapter(tmp_path: Path, llama_base: Path, full: Path) -> None:
    code, told = run(llama_base)
    assert code == 1 and "no LoRA adapter" in told["error"]["message"]
    two = ["lint", str(full), "--target", "peft", "--target", "vllm", "--fix", str(tmp_path / "x")]
    assert CliRunner().invoke(dora_export, two).exit_code == 2


def test_the_command_offers_every_engine() -> None:
    assert set(TARGETS) == profiles().keys()
    assert len(CHECKS) >= 15


def test_what_heals_reads_as_before(tmp_path: Path, llama_base: Path, full: Path) -> None:
    run(full, "--base", llama_base, "--fix", tmp_path / "healed")
    before, after = read_run(full), read_run(tmp_path / "healed")
    assert before.updates.keys() == after.updates.keys()
