"""MoRA: merged models equal the live logits of its authors' fork (runs in data/methods/mora)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from converters.readers import ReadOptions, RunFolder
from converters.readers.mora import MoraReader
from converters.updates.rank_one import RankOneSum
from converters.updates.rotated import RotatedBlocks
from converters.updates.update import transposed
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits
from tests.conftest import DATA

MORA = DATA / "methods" / "mora"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = [("llama", kind) for kind in (1, 2, 3, 4, 6)] + [("gpt2", 4), ("gpt2", 6)]


def case(family: str, kind: int) -> Any:
    method = "mora (type 6)" if kind == 6 else "mora"
    targets = ("merged",) if kind == 6 else ("merged", "peft")
    mark = pytest.mark.supports(method=method, family=family, targets=targets)
    return pytest.param(f"{family}-type{kind}", marks=mark)


RUNS = [case(family, kind) for family, kind in KINDS]


@pytest.mark.parametrize("name", RUNS)
def test_merged_model_equals_the_forks_live_logits(tmp_path: Path, name: str) -> None:
    family = name.split("-")[0]
    base = MORA / family
    cls: Any = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[family]
    expected = load_file(MORA / "expected.safetensors")
    inputs = {"input_ids": expected["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    control = logits(cls.from_pretrained(base).eval(), inputs)
    assert float((control - expected[name]).abs().max()) > 1e-2

    run = read_run(MORA / name, ReadOptions(base=base))
    assert run.method == "mora"
    merge(run, tmp_path / "out", base=base)
    merged = logits(cls.from_pretrained(tmp_path / "out").eval(), inputs)
    assert float((merged - expected[name]).abs().max()) <= 1e-4
    assert torch.equal(merged.argmax(-1), expected[name].argmax(-1))
    assert verify(run, tmp_path / "out", base).passed
    merge(run, tmp_path / "narrow", base=base, dtype=torch.bfloat16)
    assert verify(run, tmp_path / "narrow", base).passed

    if name.endswith("6"):  # not low-rank
        with pytest.raises(DoraExportError, match="`max_rank`"):
            write_adapter(run, tmp_path / "adapter", base=base)
        return
    write_adapter(run, tmp_path / "adapter", base=base)
    peft = PeftModel.from_pretrained(cls.from_pretrained(base), str(tmp_path / "adapter")).eval()
    assert float((logits(peft, inputs) - expected[name]).abs().max()) <= 1e-4


def formula(matrix: torch.Tensor, kind: int, out: int, inn: int) -> torch.Tensor:
    """ΔW `[out, in]` by D·M·C in float64, one output at a time."""
    m, n = matrix.double(), matrix.shape[0]

    def group(position: int, length: int) -> int:
        longer, size = length % n, length // n
        if position < longer * (size + 1):
            return position // (size + 1)
        return longer + (position - longer * (size + 1)) // size

    delta = torch.zeros(out, inn, dtype=torch.float64)
    padded = inn + (-inn % n)
    for o in range(out):
        if kind == 6:
            block, row = divmod(o % padded, n)
            for j in range(n):
                angle = block * 10000 ** (-2 * (j % (n // 2)) / n)
                other = m[row, j + n // 2] if j < n // 2 else -m[row, j - n // 2]
                value = m[row, j] * torch.tensor(angle).cos() + other * torch.tensor(angle).sin()
                delta[o, (block * n + j) % inn] += value
            continue
        row = o % n if kind in (1, 3) else group(o, out)
        for i in range(padded if kind in (1, 4) else inn):
            delta[o, i % inn] += m[row, i % n if kind in (1, 4) else group(i, inn)]
    return delta


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("module", ["q_proj", "up_proj", "down_proj"])
def test_merge_by_blocks_and_against_float64(kind: int, module: str) -> None:
    run = read_run(MORA / f"llama-type{kind}", ReadOptions(base=MORA / "llama"))
    name = next(name for name in run.updates if name.endswith(module))
    update = run.updates[name]
    assert isinstance(update, RotatedBlocks if kind == 6 else RankOneSum)
    matrix = load_file(run.path / WEIGHTS)[f"base_model.model.{name}.lora_A.weight"]
    out, inn = update.shape
    weight = torch.randn(out, inn, generator=torch.Generator().manual_seed(0))
    expected = weight.double() + formula(matrix, kind, out, inn)
    whole = update.merge(weight.clone(), 0)
    assert float(((whole - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= 1e-6
    parts = [update.merge(weight[i : i + 7].clone(), i) for i in range(0, out, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    turned = transposed(update)
    assert turned.shape == (inn, out)
    back = turned.merge(weight.T.contiguous(), 0).T
    torch.testing.assert_close(back, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no base", "`base`"),
        ("other base", "no such linear layer"),
        ("wider base", "does not fit the base weight"),
        ("unknown type", "cannot be read"),
        ("with dora", "cannot be read"),
        ("no lora_B", "incomplete"),
        ("not square", "not square"),
        ("embedding", "does not read"),
    ],
)
def test_bad_adapters(tmp_path: Path, damage: str, message: str) -> None:
    folder, base = tmp_path / "run", MORA / "llama"
    shutil.copytree(MORA / "llama-type6", folder)
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    a, b = sorted(name for name in tensors if "up_proj" in name)
    options = ReadOptions(base=base)
    if damage == "no base":
        options = ReadOptions()
    elif damage == "other base":
        options = ReadOptions(base=MORA / "gpt2")
    elif damage == "wider base":
        config["r"] = 7
    elif damage == "unknown type":
        config["mora_type"] = 5
    elif damage == "with dora":
        config["use_dora"] = True
    elif damage == "no lora_B":
        del tensors[b]
    elif damage == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(3, 24)
    else:
        tensors[a] = tensors[a][:, :-1].clone()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DoraExportError, match=message):
        read_run(folder, options)


def test_two_matrices_that_differ_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(MORA / "llama-type1", folder)
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("up_proj.lora_B.weight"))
    save_file({**tensors, name: tensors[name] + 1}, folder / WEIGHTS)
    with pytest.raises(DoraExportError, match="differ"):
        merge(folder, tmp_path / "out", base=MORA / "llama")
    assert not (tmp_path / "out").exists()


def test_other_adapters_are_not_mora(llama_lora: Path) -> None:
    assert MoraReader().detect(RunFolder(llama_lora)) is None
