"""Fitted adapters: the bound is asked for, kept, told everywhere, and proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from dora_serve import DoraExportError, diff, read_run, verify, write_adapter
from dora_serve.commands import dora_export
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import MODELS, randomize, tiny_llama

RUN = next(MODELS.glob("runs/Checkpoint/*/*/Count_Down/*"))
BASE = MODELS / "tiny-llama-base"


def export(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(dora_export, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def weight_decomposed(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose update is no sum of components (PEFT's `use_dora`)."""
    folder = tmp_path_factory.mktemp("dora") / "adapter"
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "limit", [("--max-rank", 4), ("--energy", 0.9), ("--budget", 9000)], ids=lambda limit: limit[0]
)
def test_the_error_is_told_everywhere_and_is_true(limit: tuple[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("adapter", RUN, out, "--base", BASE, *limit)
    shown = export(*arguments)
    told = json.loads(export(*arguments, "--force", "--json").stdout)["fit"]
    assert told["limit"] == {limit[0][2:].replace("-", "_"): limit[1]}
    percent = f"{100 * told['error']:.3g} %"
    assert f"parameters, error {percent}" in shown.stdout
    assert all(module in shown.stdout for module in told["errors"])
    assert f"differs from the run's by {percent} in all" in shown.stderr
    assert json.loads((out / "dora_export.json").read_text())["fit"] == told
    assert f"of {percent} in all" in (out / "README.md").read_text()

    found = diff(RUN, out, base=BASE)
    assert found.total.relative == pytest.approx(told["error"], rel=1e-5)
    for module, error in told["errors"].items():
        assert found.modules[f"{module}.weight"].relative == pytest.approx(error, abs=1e-6)
    if limit[0] == "--energy":
        assert max(told["errors"].values()) <= (1 - limit[1]) ** 0.5
    if limit[0] == "--budget":
        assert told["parameters"] <= limit[1]
        assert told["least"] <= told["error"]


def test_verify_proves_what_was_stored_and_tells_what_the_fit_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_adapter(RUN, out, base=BASE, max_rank=6)
    found = verify(read_run(RUN), out, BASE)
    assert found.passed
    assert found.fit == {"max_rank": 6}
    assert found.unfitted is not None
    assert found.unfitted > 1e-2
    shown = export("verify", RUN, out, "--base", BASE).stdout
    assert "max_rank 6: the truth above is the live run so fitted" in shown
    # the control: the same adapter, said to be of another fit
    certificate = out / "dora_export.json"
    for said in ({"limit": {"max_rank": 3}}, None):
        text = json.loads(certificate.read_text())
        certificate.write_text(json.dumps({**text, "fit": said}))
        assert not verify(read_run(RUN), out, BASE).passed
    certificate.write_text(json.dumps({"fit": {"limit": {"rank": "x"}}}))
    with pytest.raises(DoraExportError, match="certificate"):
        verify(read_run(RUN), out, BASE)


def test_without_a_limit_nothing_is_approximated(tmp_path: Path) -> None:
    result = write_adapter(RUN, tmp_path / "out", base=BASE)
    assert result.plan.run.fit is None
    assert verify(read_run(RUN), tmp_path / "out", BASE).fit is None
    cut_nothing = export("adapter", RUN, tmp_path / "same", "--base", BASE, "--max-rank", 12)
    assert "approximated" not in cut_nothing.stderr
    assert verify(read_run(RUN), tmp_path / "same", BASE).unfitted == pytest.approx(0, abs=1e-4)


def test_limits_exclude_each_other(tmp_path: Path) -> None:
    arguments = ("adapter", RUN, tmp_path / "out", "--max-rank", 2, "--energy", 0.9)
    assert "one of --max-rank" in export(*arguments, code=2).output


def test_an_update_without_components_needs_a_bound_and_reaches_it(
    weight_decomposed: Path, llama_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(DoraExportError, match=r"`merge`(.|\n)*`energy`"):
        write_adapter(weight_decomposed, tmp_path / "out", base=llama_base)
    shown = export(
        "adapter", weight_decomposed, tmp_path / "out", "--base", llama_base, "--energy", 0.95
    )
    assert "approximated" in shown.stderr
    found = diff(weight_decomposed, tmp_path / "out", base=llama_base)
    assert 0 < (found.total.relative or 0) <= 0.05**0.5
    assert verify(read_run(weight_decomposed), tmp_path / "out", llama_base).passed

    write_adapter(weight_decomposed, tmp_path / "full", base=llama_base, energy=1 - 1e-13)
    live = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(llama_base), weight_decomposed
    ).eval()
    inputs = verification_batch(live)
    truth = logits(live, inputs)
    with live.disable_adapter():
        without = logits(live, inputs)
    plain = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(llama_base), tmp_path / "full"
    ).eval()
    assert float((logits(plain, inputs) - truth).abs().max()) <= 1e-4
    assert float((without - truth).abs().max()) > 1e-2


def test_a_trained_bias_stays_where_the_fit_drops_the_module(tmp_path: Path) -> None:
    base = tiny_llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["v_proj"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    randomize(model, ("lora_", "v_proj.bias", "v_proj.base_layer.bias"))
    model.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run")
    result = write_adapter(run, tmp_path / "out", base=tmp_path / "base", budget=50)
    assert result.plan.run.fit is not None
    assert sorted(result.plan.run.fit.ranks.values()) == [0, 1]
    proof = verify(run, tmp_path / "out", tmp_path / "base")
    assert proof.max_abs <= 1e-5


def test_a_fit_brings_a_rank_under_an_engines_limit_and_dry_run_tells_it(tmp_path: Path) -> None:
    arguments = ("adapter", RUN, tmp_path / "out", "--base", BASE, "--target", "vllm")
    told = json.loads(export(*arguments, "--max-rank", 3, "--dry-run", "--json").stdout)
    assert told["max_rank"] == 3
    assert told["fit"]["error"] > 0
    assert "approximated" in told["warnings"][-1]
    assert not (tmp_path / "out").exists()


def test_inspect_shows_the_curve(tmp_path: Path) -> None:
    png = tmp_path / "curve.png"
    shown = export("inspect", RUN, "--curve", "--curve-png", png).stdout
    assert "--budget" in shown
    assert png.read_bytes()[:4] == b"\x89PNG"
    points = json.loads(export("inspect", RUN, "--curve", "--json").stdout)["curve"]
    assert points[-1]["error"] == 0
    assert str(points[9]["parameters"]) in shown
    chosen = points[9]
    result = write_adapter(RUN, tmp_path / "out", budget=chosen["parameters"])
    assert result.plan.run.fit is not None
    assert result.plan.run.fit.error == pytest.approx(chosen["error"])
    assert result.plan.nbytes == 4 * chosen["parameters"] + sum(
        4 * torch.Size(tensor.shape).numel() for tensor in result.plan.whole.values()
    )
