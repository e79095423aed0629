"""A dry run and the command agree: for every target, and every refusal that is planted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from converters.targets.target import targets
from tests.conftest import quick, randomize, tiny_llama

from .exporting import bad, good

Words = list[object]
TARGETS = list(targets())
ADAPTERS = [name for name, target in targets().items() if target.kind == "adapter"]
# What each of these trains, no adapter carries.
UPDATES: dict[str, dict[str, Any]] = {
    "no sum of components": {"use_dora": True},
    "an adapted bias": {"lora_bias": True},
}


def run_of(base: Path, out: Path, **config: Any) -> Path:
    lora = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    randomize(model, ("lora_", "modules_to_save"))
    model.save_pretrained(out)
    return out


def full(folder: Path, run: Path, base: Path) -> Words:
    (folder / "out").mkdir()
    (folder / "out" / "file").write_text("somebody's")
    return [run, folder / "out", "--base", base]


def a_file(folder: Path, run: Path, base: Path) -> Words:
    (folder / "out").write_text("somebody's")
    return [run, folder / "out", "--base", base]


def in_the_base(folder: Path, run: Path, base: Path) -> Words:
    shutil.copytree(base, folder / "base")
    return [run, folder / "base" / "out", "--base", folder / "base"]


def in_the_run(folder: Path, run: Path, base: Path) -> Words:
    shutil.copytree(run, folder / "run")
    return [folder / "run", folder / "run" / "out", "--base", base]


def around_the_run(folder: Path, run: Path, base: Path) -> Words:
    shutil.copytree(run, folder / "out" / "run")
    return [folder / "out" / "run", folder / "out", "--base", base, "--force"]


def another_base(folder: Path, run: Path, base: Path) -> Words:  # noqa: ARG001
    tiny_llama(hidden_size=64).save_pretrained(folder / "other")
    return [run, folder / "out", "--base", folder / "other"]


def a_layer_too_few(folder: Path, run: Path, base: Path) -> Words:  # noqa: ARG001
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "other")
    return [run, folder / "out", "--base", folder / "other"]


def no_base(folder: Path, run: Path, base: Path) -> Words:  # noqa: ARG001
    return [run, folder / "out", "--base", folder / "nowhere"]


REFUSALS: list[Callable[[Path, Path, Path], Words]] = [
    full,
    a_file,
    in_the_base,
    in_the_run,
    around_the_run,
    another_base,
    a_layer_too_few,
    no_base,
]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def agree(folder: Path, target: str, words: Words) -> str:
    """What both say, having written nothing."""
    before = files(folder)
    planned = bad("export", *words, "--target", target, "--dry-run")
    assert bad("export", *words, "--target", target) == planned
    assert files(folder) == before
    return planned


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_a_refusal_is_planned(
    target: str,
    refusal: Callable[[Path, Path, Path], Words],
    llama_lora: Path,
    llama_base: Path,
    tmp_path: Path,
) -> None:
    agree(tmp_path, target, refusal(tmp_path, llama_lora, llama_base))


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_planned(
    target: str,
    llama_lora: Path,
    llama_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    said = agree(tmp_path, target, [llama_lora, tmp_path / "out", "--base", llama_base])
    assert "not enough space" in said


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("target", ADAPTERS)
def test_an_update_that_no_adapter_carries(
    target: str, update: str, llama_base: Path, tmp_path: Path
) -> None:
    run = run_of(llama_base, tmp_path / "run", **UPDATES[update])
    agree(tmp_path, target, [run, tmp_path / "out", "--base", llama_base])


@pytest.mark.parametrize("target", ["gguf", "lorax", "sglang", "vllm"])
def test_a_tensor_trained_whole(target: str, llama_base: Path, tmp_path: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    assert "lm_head" in agree(tmp_path, target, [run, tmp_path / "out", "--base", llama_base])


def test_a_bias_that_a_branch_of_a_graph_has_no_place_for(tmp_path: Path) -> None:
    """Of a base that has one: the plan refuses what the graph, once built, would not take."""
    base = tmp_path / "base"
    tiny_llama(attention_bias=True).save_pretrained(base)
    run = run_of(base, tmp_path / "run", lora_bias=True)
    words = ["onnx", tmp_path / "out", "--base", base, "--adapter", run, "--dry-run"]
    assert "cannot carry" in bad(*words)


def test_a_dtype_that_a_quantized_base_has_no_place_for(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    import json

    base = tmp_path / "base"
    shutil.copytree(llama_base, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    words = [llama_lora, tmp_path / "out", "--base", base, "--dtype", "float16"]
    assert "quantized base" in agree(tmp_path, "merged", words)


@pytest.mark.parametrize("target", quick(TARGETS, *(n for n in TARGETS if n != "onnx")))
def test_what_is_planned_is_written(
    target: str, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    """The control: nothing above was refused for another reason."""
    out = tmp_path / "out"
    words = ["export", llama_lora, out, "--base", llama_base, "--target", target]
    said = good(*words, "--dry-run")
    assert said.startswith(f"would write {out}: ")
    assert not out.exists()
    assert good(*words).startswith(said.splitlines()[0].removeprefix("would write "))
    assert (out / "dora_export.json").is_file()
    for more in (["--dry-run"], []):
        assert "not empty" in bad(*words, *more)
