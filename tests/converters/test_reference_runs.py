"""Runs made by the reference implementation itself, compared with logits of its own live model.

See `tests/data/reference/README.md`. `base_logits` are the same model with every scaler zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from converters.model.base import open_base
from converters.targets.opening import load_base
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter
from dora_serve.proof.live import LiveModel
from tests.conftest import DATA, quick

ROOT = DATA / "reference"
RUNS: list[dict[str, Any]] = json.loads((ROOT / "index.json").read_text())
BOUND = 1e-4


def proves(entry: dict[str, Any]) -> pytest.MarkDecorator:
    """The row of the support matrix that the comparison with the live model stands for."""
    method = "dora (fixed rank)" if entry["finetune_type"] == "Fixed_Lora" else "dora"
    family = json.loads((ROOT / entry["base"] / "config.json").read_text())["model_type"]
    return pytest.mark.supports(method=method, family=family, targets=("merged", "peft"))


@pytest.fixture(params=RUNS, ids=[entry["name"] for entry in RUNS])
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def logits(model: Any, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.inference_mode():
        output = model.eval()(**{name: expected[name] for name in names if name in expected})
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits])
    found: torch.Tensor = output.logits
    return found


def truth(expected: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    if f"{prefix}start_logits" in expected:
        return torch.cat([expected[f"{prefix}start_logits"], expected[f"{prefix}end_logits"]])
    return expected[f"{prefix}logits"]


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize(
    "entry",
    quick(
        [pytest.param(e, marks=proves(e), id=e["name"]) for e in RUNS],
        *("roberta", "roberta-qa", "bart-bin", "llama-unfinished", "llama-ddp", "llama-32"),
    ),
)
def test_every_artifact_equals_the_reference_implementations_live_model(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    base, run = ROOT / entry["base"], read_run(ROOT / entry["checkpoint"])
    expected = load_file(ROOT / entry["expected"])
    assert run.finished == entry["finished"]
    assert run.task == entry["task"]
    assert largest(truth(expected), truth(expected, "base_")) > 1e-2

    merge(run, tmp_path / "merged", base=base)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    cls = getattr(transformers, config.architectures[0])
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = logits(merged, expected)
    assert largest(found, truth(expected)) <= BOUND
    assert torch.equal(found.argmax(-1), truth(expected).argmax(-1))
    assert largest(found, truth(expected, "base_")) > BOUND  # the control

    write_adapter(run, tmp_path / "adapter", base=base)
    with_base = PeftModel.from_pretrained(load_base(run, open_base(base)), tmp_path / "adapter")
    assert largest(logits(with_base, expected), truth(expected)) <= BOUND
    for artifact in ("merged", "adapter"):
        assert verify(run, tmp_path / artifact, base).passed


def test_our_live_model_is_the_reference_implementations(entry: dict[str, Any]) -> None:
    live = LiveModel(read_run(ROOT / entry["checkpoint"]), open_base(ROOT / entry["base"]))
    expected = load_file(ROOT / entry["expected"])
    assert largest(logits(live.model, expected), truth(expected)) <= BOUND
    live.detach()
    assert largest(logits(live.model, expected), truth(expected, "base_")) <= BOUND


def test_unfinished_runs_say_so(entry: dict[str, Any]) -> None:
    warned = any(
        "had not finished" in text for text in read_run(ROOT / entry["checkpoint"]).warnings
    )
    assert warned != entry["finished"]


def test_no_vllm_adapter_of_a_run_with_a_whole_head_or_of_another_family(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    run = read_run(ROOT / entry["checkpoint"])
    heads = {"causal-lm": "lm_head", "question-answering": "qa_outputs"}
    reason = heads.get(entry["task"], "does not adapt")
    with pytest.raises(DoraExportError, match=rf"{reason}(.|\n)*`merge`"):
        write_adapter(run, tmp_path / "out", base=ROOT / entry["base"], target="vllm")
    assert not (tmp_path / "out").exists()
